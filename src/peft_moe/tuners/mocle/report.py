"""`ClusterReport` and `ClusterChoice`: what clusters hold and how many there should be, as tables to read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClusterReport:
    """What clusters hold; `print` shows it as a table in markdown.

    Args:
        sizes (`tuple[int, ...]`): texts per cluster, K numbers.
        examples (`tuple[tuple[str, ...], ...]`): instructions nearest to each centroid, nearest first.
        domain_counts (`dict[str, tuple[int, ...]]`, *optional*): texts per cluster of each domain.
        adjusted_rand_index (`float`, *optional*):
            Agreement of clusters and domains: 1 is the same grouping, 0 is chance.
        purity (`float`, *optional*):
            Share of the texts whose domain is the most frequent one of their cluster. It grows with K.
    """

    sizes: tuple[int, ...]
    examples: tuple[tuple[str, ...], ...]
    domain_counts: dict[str, tuple[int, ...]] | None = None
    adjusted_rand_index: float | None = None
    purity: float | None = None

    @classmethod
    def of(
        cls, cluster_ids: list[int], examples: tuple[tuple[str, ...], ...], domains: list[str] | None = None
    ) -> ClusterReport:
        """The report on N texts, of which the clusters, typical texts and, if known, the domains are given."""
        num_clusters = len(examples)
        sizes = tuple(map(Counter(cluster_ids).__getitem__, range(num_clusters)))
        if domains is None:
            return cls(sizes, examples)
        from sklearn.metrics import adjusted_rand_score

        pairs = Counter(zip(domains, cluster_ids, strict=True))
        names = sorted(set(domains))
        counts = {name: tuple(pairs[name, cluster] for cluster in range(num_clusters)) for name in names}
        largest = sum(max(of_cluster) for of_cluster in zip(*counts.values(), strict=True))
        score = float(adjusted_rand_score(domains, cluster_ids))
        return cls(sizes, examples, counts, adjusted_rand_index=score, purity=largest / len(domains))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for json."""
        return asdict(self)

    def __str__(self) -> str:
        total, num_empty = sum(self.sizes), self.sizes.count(0)
        lines = [
            f"{total} texts in {len(self.sizes)} clusters of {min(self.sizes)} to {max(self.sizes)}, {num_empty} "
            "empty."
        ]
        if self.domain_counts is not None:
            lines.append(
                f"Clusters and domains: adjusted Rand index {self.adjusted_rand_index:.3f} (1 = the same grouping, 0 "
                f"= chance), purity {self.purity:.3f}."
            )
        counts = self.domain_counts or {}
        header = ["cluster", "texts", "share", *counts, "typical"]
        rows = []
        for cluster, size in enumerate(self.sizes):
            typical = "; ".join(_cell(text) for text in self.examples[cluster])
            by_domain = [str(values[cluster]) for values in counts.values()]
            rows.append([str(cluster), str(size), f"{size / total:.1%}" if total else "", *by_domain, typical])
        return "\n\n".join([*lines, _markdown(header, rows)])


@dataclass(frozen=True)
class ClusterCandidate:
    """One number of clusters that was tried.

    Args:
        num_clusters (`int`): K.
        inertia (`float`): sum of the squared distances of all texts to their centroids. It falls with K.
        silhouette (`float`):
            In [-1, 1]: how much nearer texts are to their own cluster than to the next one; `nan` where the sample
            fell into one cluster.
        min_size (`int`), max_size (`int`): different instructions in the smallest and in the largest cluster.
    """

    num_clusters: int
    inertia: float
    silhouette: float
    min_size: int
    max_size: int


@dataclass(frozen=True)
class ClusterChoice:
    """What [`choose_num_clusters`] found; `print` shows it as a table in markdown."""

    candidates: tuple[ClusterCandidate, ...]

    @property
    def best(self) -> int:
        """The number of clusters with the highest silhouette; of equal ones the smallest."""
        known = [entry for entry in self.candidates if not math.isnan(entry.silhouette)]
        return min(known or self.candidates, key=lambda entry: (-entry.silhouette, entry.num_clusters)).num_clusters

    def to_dict(self) -> dict[str, Any]:
        """As plain values for json."""
        return {"best": self.best, "candidates": [asdict(entry) for entry in self.candidates]}

    def __str__(self) -> str:
        header = ["clusters", "inertia", "silhouette", "smallest", "largest", ""]
        rows = [
            [
                str(entry.num_clusters),
                f"{entry.inertia:.1f}",
                f"{entry.silhouette:.3f}",
                str(entry.min_size),
                str(entry.max_size),
                "best" if entry.num_clusters == self.best else "",
            ]
            for entry in self.candidates
        ]
        return _markdown(header, rows)


def _cell(text: str, length: int = 60) -> str:
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text.replace("|", "\\|")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (lines[0], ["-" * width for width in widths], *lines[1:])
    )
