"""`choose_num_clusters`: how well several numbers of clusters fit the same instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cluster_report import ClusterCandidate, ClusterChoice
from .cluster_texts import PLACE_OF_INSTRUCTION, Texts, check_count, check_texts_settings, read_instructions
from .kmeans import DistinctTexts, nearest_centroid, run_kmeans
from .encoder import DEFAULT_ENCODER, SentenceEncoder


if TYPE_CHECKING:
    import numpy


SILHOUETTE_MAX_TEXTS = 5_000
DEFAULT_CANDIDATES = (2, 4, 8, 16, 32, 64)


def choose_num_clusters(
    texts: Texts,
    candidates: Sequence[int] = DEFAULT_CANDIDATES,
    *,
    encoder: str | Path | SentenceEncoder = DEFAULT_ENCODER,
    template: str = PLACE_OF_INSTRUCTION,
    instruction_pattern: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    show_progress: bool = True,
) -> ClusterChoice:
    """Try several numbers of clusters on the same vectors, as [`InstructionClusterer.fit`] would make them.

    The silhouette is Euclidean, over different instructions, on a seeded sample above 5,000 of them
    (`SILHOUETTE_MAX_TEXTS`). It says how well groups are separated, not how well a model trained on them will be: take it
    as a hint. The paper has no such step.

    Args:
        texts (`Iterable`): texts or chats.
        candidates (`Sequence[int]`): numbers of clusters to try, each at least 2.
        encoder, template, instruction_pattern, seed, batch_size, show_progress: as in [`InstructionClusterer.fit`].

    Raises:
        ValueError: no candidates, one below 2, or one that is not below the number of different instructions; or as in
            [`InstructionClusterer.fit`].

    Example:

    ```py
    >>> choice = choose_num_clusters(dataset["prompt"], (4, 16, 64))
    >>> print(choice)
    >>> clusterer = InstructionClusterer.fit(dataset["prompt"], choice.best)
    ```
    """
    check_texts_settings(template, instruction_pattern)
    if not candidates:
        raise ValueError("candidates is empty: name at least one number of clusters to try.")
    for candidate in candidates:
        check_count("each of candidates", candidate, at_least=2)
    instructions = read_instructions(texts, instruction_pattern)
    if max(candidates) >= (num_distinct := len(set(instructions))):
        raise ValueError(
            f"{max(candidates)} clusters of {num_distinct} different instructions have no silhouette: some cluster has to "
            f"have two of them. Name candidates of at most {num_distinct - 1}, or add texts."
        )
    encoder = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
    points = DistinctTexts.encode(instructions, encoder, template, batch_size=batch_size, show_progress=show_progress)
    points.check_distinct(max(candidates))
    return ClusterChoice(tuple(_try(points, candidate, seed) for candidate in sorted(set(candidates))))


def _try(points: DistinctTexts, num_clusters: int, seed: int) -> ClusterCandidate:
    model = run_kmeans(points, num_clusters, seed)
    ids = nearest_centroid(points.vectors, torch.from_numpy(model.cluster_centers_))
    sizes = torch.bincount(ids, minlength=num_clusters)
    return ClusterCandidate(
        num_clusters,
        inertia=float(model.inertia_),
        silhouette=_silhouette(points.vectors.numpy(), ids.numpy(), seed),
        min_size=int(sizes.min()),
        max_size=int(sizes.max()),
    )


def _silhouette(vectors: numpy.ndarray, ids: numpy.ndarray, seed: int) -> float:
    import numpy as np
    from sklearn.metrics import silhouette_score

    if len(vectors) > SILHOUETTE_MAX_TEXTS:
        chosen = np.random.default_rng(seed).choice(len(vectors), SILHOUETTE_MAX_TEXTS, replace=False)
        vectors, ids = vectors[chosen], ids[chosen]
    return float(silhouette_score(vectors, ids)) if 1 < len(np.unique(ids)) < len(ids) else math.nan
