"""k-means over the vectors of different texts, and the centroid that is nearest to a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .cluster_texts import PLACE_OF_INSTRUCTION
from .encoder import SentenceEncoder


KMEANS_MAX_TEXTS = 50_000
KMEANS_NUM_STARTS = 10
MINI_BATCH_SIZE = 4096
CHUNK_SIZE = 4096
TIE_TOLERANCE = 1e-9


def nearest_centroid(embeddings: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid at the smallest Euclidean distance from each embedding; of equally near ones that with the lowest id.

    Computes in float64 and in chunks, so that the answer for a row does not depend on the other rows.

    Args:
        embeddings (`torch.Tensor`): shape `(N, C)`.
        centroids (`torch.Tensor`): shape `(K, C)`.

    Returns:
        `torch.Tensor`: shape `(N,)`, int64, on the device of `embeddings`.

    Raises:
        ValueError: shapes do not fit, or values are not finite.

    >>> nearest_centroid(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1])
    """
    if embeddings.dim() != 2 or centroids.dim() != 2 or embeddings.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"Embeddings of shape {tuple(embeddings.shape)} do not fit centroids of shape {tuple(centroids.shape)}: (N, C) "
            "and (K, C) are needed. Use the encoder that the centroids were made with."
        )
    for name, values in (("embeddings", embeddings), ("centroids", centroids)):
        if not torch.isfinite(values).all():
            raise ValueError(f"The {name} hold values that are not finite, so no centroid is the nearest.")
    centres = centroids.detach().cpu().double()
    lengths = centres.square().sum(dim=1)
    nearest = torch.empty(embeddings.shape[0], dtype=torch.long)
    for start in range(0, embeddings.shape[0], CHUNK_SIZE):
        chunk = embeddings[start : start + CHUNK_SIZE].detach().cpu().double()
        # the square of the embedding itself is the same for all centroids
        distances = lengths - 2 * chunk @ centres.T
        tolerance = TIE_TOLERANCE * (lengths.max() + chunk.square().sum(dim=1, keepdim=True))
        is_nearest = distances <= distances.min(dim=1, keepdim=True).values + tolerance
        nearest[start : start + CHUNK_SIZE] = is_nearest.int().argmax(dim=1)
    return nearest.to(embeddings.device)


@dataclass(frozen=True)
class DistinctTexts:
    """Different instructions, their vectors `(D, C)`, how often each occurs `(D,)`, and which one each text is `(N,)`."""

    texts: list[str]
    vectors: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor

    @classmethod
    def encode(
        cls, instructions: list[str], encoder: SentenceEncoder, template: str, *, batch_size: int, show_progress: bool
    ) -> DistinctTexts:
        places = {text: place for place, text in enumerate(dict.fromkeys(instructions))}
        index = torch.tensor([places[text] for text in instructions])
        vectors = encoder.encode(
            [template.replace(PLACE_OF_INSTRUCTION, text) for text in places],
            batch_size=batch_size,
            show_progress=show_progress,
        )
        return cls(list(places), vectors, torch.bincount(index).float(), index)

    def check_distinct(self, num_clusters: int) -> None:
        """Different texts may have the same vector, when they differ in what the encoder does not see."""
        import numpy as np

        check_enough(len(np.unique(self.vectors.numpy().round(5), axis=0)), num_clusters, what="embeddings")


def run_kmeans(points: DistinctTexts, num_clusters: int, seed: int) -> Any:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    settings: dict[str, Any] = {"n_init": KMEANS_NUM_STARTS, "random_state": seed}
    if len(points.texts) <= KMEANS_MAX_TEXTS:
        model = KMeans(num_clusters, **settings)
    else:
        model = MiniBatchKMeans(num_clusters, batch_size=MINI_BATCH_SIZE, **settings)
    return model.fit(points.vectors.numpy(), sample_weight=points.weights.numpy())


def check_enough(num_distinct: int, num_clusters: int, *, what: str) -> None:
    if num_clusters > num_distinct:
        raise ValueError(
            f"{num_clusters} clusters were asked for, but there are only {num_distinct} different {what}. Ask for at most "
            f"{num_distinct}, or add texts."
        )
