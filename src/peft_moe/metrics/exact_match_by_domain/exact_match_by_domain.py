"""Exact match per domain and averaged over domains, as a module for `evaluate`."""

import re
from collections import defaultdict

import datasets
import evaluate


DESCRIPTION = """
Share of answers that match the reference, per domain, and their unweighted mean over domains. Case, runs of whitespace
and trailing punctuation do not count. Where the reference starts with an option letter ("B. refrigerator"), only the
letter of the prediction is compared.
"""

INPUTS = """
Args:
    predictions: list of generated answers (str).
    references: list of right answers (str).
    domains: list of domain names (str), one for each pair.
Returns:
    exact_match: mean over domains (macro), in [0, 1].
    exact_match_<domain>: the share in one domain, in [0, 1].
"""


class ExactMatchByDomain(evaluate.Metric):
    """Exact match on normalised answers, macro-averaged over domains."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value("string") for name in ("predictions", "references", "domains")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(columns)
        )

    def _compute(self, predictions: list[str], references: list[str], domains: list[str]) -> dict[str, float]:
        hits = defaultdict(list)
        for prediction, reference, domain in zip(predictions, references, domains):
            hits[domain].append(is_match(prediction, reference))
        shares = {domain: sum(hits[domain]) / len(hits[domain]) for domain in sorted(hits)}
        macro = sum(shares.values()) / len(shares)
        return {"exact_match": macro, **{f"exact_match_{domain}": share for domain, share in shares.items()}}


def is_match(prediction: str, reference: str) -> bool:
    """Whether an answer counts as the reference."""
    prediction, reference = normalize(prediction), normalize(reference)
    wanted = re.match(r"\(?([a-z])[.):]\s", reference)
    if wanted is None:
        return prediction == reference
    given = re.match(r"\(?([a-z])(?:[.):]|$)", prediction)
    return given is not None and given[1] == wanted[1]


def normalize(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the end."""
    return " ".join(answer.lower().split()).rstrip(" .,;:!?")
