"""Answer NLL per domain and averaged over domains, as a module for `evaluate`."""

from collections import defaultdict

import datasets
import evaluate


DESCRIPTION = """
Negative log-likelihood of the reference answers in nats per answer token, per domain, and its unweighted mean over
domains. Within a domain every token counts the same, whatever the batches were.
"""

INPUTS = """
Args:
    predictions: list of floats, the NLL of each answer in nats, summed over its tokens.
    references: list of ints, how many tokens each answer has.
    domains: list of domain names (str), one for each answer.
Returns:
    answer_nll: mean over domains (macro), in nats per token.
    answer_nll_<domain>: the value of one domain.
"""


class AnswerNLL(evaluate.Metric):
    """Token-weighted answer NLL, macro-averaged over domains."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("int64"),
            "domains": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(columns)
        )

    def _compute(self, predictions: list[float], references: list[int], domains: list[str]) -> dict[str, float]:
        nll, num_tokens = defaultdict(float), defaultdict(int)
        for summed, count, domain in zip(predictions, references, domains):
            nll[domain] += summed
            num_tokens[domain] += count
        if empty := sorted(domain for domain, count in num_tokens.items() if count == 0):
            raise ValueError(f"No answer tokens in domains {empty}: are all their labels -100?")
        means = {domain: nll[domain] / num_tokens[domain] for domain in sorted(nll)}
        macro = sum(means.values()) / len(means)
        return {"answer_nll": macro, **{f"answer_nll_{domain}": mean for domain, mean in means.items()}}
