"""WHO goes where: routers turn hidden states, or the cluster of an example, into a `RouterOutput`."""

from .cluster import ClusterCentroids, ClusterEmbedding, ClusterRouter
from .router_output import RouterOutput
from .top_k import TopKRouter, top_k_weights


__all__ = [
    "ClusterCentroids",
    "ClusterEmbedding",
    "ClusterRouter",
    "RouterOutput",
    "TopKRouter",
    "top_k_weights",
]
