"""WHO goes where: routers turn hidden states into a `RouterOutput`."""

from .router_output import RouterOutput
from .top_k import TopKRouter, top_k_weights


__all__ = ["RouterOutput", "TopKRouter", "top_k_weights"]
