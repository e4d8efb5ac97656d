"""Scores of `mole_defaults.py`: the NLL of answers, and what the routers know of the domains."""

from __future__ import annotations

from typing import Any

import torch
from mole_defaults_data import DOMAINS, Row, collate
from torch import nn

from peft_moe.forward_context import ForwardPass
from peft_moe.routing_recorder import get_recorder, statistics_of


@torch.no_grad()
def answer_nll(model: nn.Module, rows: list[Row]) -> float:
    """Mean over answer tokens, in nats."""
    model.eval()
    summed, count = 0.0, 0
    in_order = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(in_order), 50):
        batch = collate(in_order[start : start + 50])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        summed, count = summed + nll.item(), count + int(labels.ne(-100).sum())
    return summed / count


class ExpertCounts:
    """How often each router sent tokens of a domain to each expert: `counts[router]` is `(domains, E)`.

    A soft mixture uses every expert for every token; for it the probabilities are added up instead.
    """

    def __init__(self, *, is_soft: bool) -> None:
        self.domain, self.is_soft = 0, is_soft
        self.counts: dict[str, torch.Tensor] = {}

    def __call__(self, forward_pass: ForwardPass) -> None:
        """A listener of the recorder."""
        for name, entry in statistics_of(forward_pass)["default"].items():
            amount = entry.probability_sums if self.is_soft else entry.expert_counts
            table = self.counts.setdefault(name, torch.zeros(len(DOMAINS), amount.shape[-1], dtype=torch.float64))
            table[self.domain] += amount.sum(dim=0).double()


def specialisation(counts: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Mutual information of expert and domain (domains weigh the same) and entropy of the load, bits per router."""
    information, entropies = [], []
    for table in counts.values():
        given = table / table.sum(dim=1, keepdim=True)
        load = given.mean(dim=0)
        entropies.append(entropy(load))
        information.append(max(0.0, entropy(load) - sum(entropy(row) for row in given) / len(given)))
    return {"mutual_information_bits": information, "load_entropy_bits": entropies}


def entropy(distribution: torch.Tensor) -> float:
    """In bits."""
    return float(-(distribution * distribution.clamp(min=1e-12).log2()).sum())


def score(model: nn.Module, sides: dict[str, dict[str, list[Row]]], *, is_soft: bool = False) -> dict[str, Any]:
    """Answer NLL of each domain on each side of the split, and what the routers do on the test rows."""
    found: dict[str, Any] = {
        "validation": {domain: answer_nll(model, rows) for domain, rows in sides["validation"].items()}
    }
    recorder, counts = get_recorder(model), ExpertCounts(is_soft=is_soft)
    if recorder is not None:
        recorder.listeners.append(counts)
    found["test"] = {}
    for domain, rows in sides["test"].items():
        counts.domain = DOMAINS.index(domain)
        found["test"][domain] = answer_nll(model, rows)
    if counts.counts:
        found["routing"] = specialisation(counts.counts)
    return found
