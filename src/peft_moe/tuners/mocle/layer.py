"""A frozen linear with LoRA experts that the cluster of an example chooses."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...routing import ClusterCentroids, ClusterEmbedding, ClusterRouter
from ...routing_recorder import RoutingRecorder
from ..base import refuse_reentrant_checkpointing_under_ddp, refuse_replica
from ..experts_layer import LoraExpertsLayer, Routed
from .clusters import ClusterLookup
from .config import MoCLEConfig
from .scope import GateScope


class MoCLELayer(LoraExpertsLayer):
    """A linear with stacked LoRA experts, the universal one last.

    Keys of a saved adapter, C clusters, E experts: `mocle_A.weight` `(E + 1, R, D)`, `mocle_B.weight` `(E + 1, R, O)`; in
    the first linear of each layer `mocle_gate.weight` `(E, C')` and perhaps `mocle_gate.bias` `(E,)`; in the first linear
    of the model (by default) `mocle_embedding.weight` `(C, C')` and `mocle_centroids.weight` `(C, C')`.
    """

    prefix = "mocle_"
    adapter_layer_names: tuple[str, ...] = ("mocle_A", "mocle_B", "mocle_gate", "mocle_embedding")
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "num_experts",
        "mocle_dropout",
        "mocle_centroids",
        "scopes",
        "backend",
    )

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder) -> None:
        super().__init__(base_layer, name, recorder)
        self.scopes: dict[str, GateScope] = {}
        self.mocle_gate = nn.ModuleDict()
        self.mocle_embedding = nn.ModuleDict()
        self.mocle_centroids = nn.ModuleDict()

    def update_layer(
        self,
        adapter_name: str,
        config: MoCLEConfig,
        *,
        r: int,
        lora_alpha: float,
        scope: GateScope,
        owns_embedding: bool,
        owns_centroids: bool,
    ) -> None:
        """Add an adapter, or replace one of the same name.

        Args:
            adapter_name (`str`), config (`MoCLEConfig`): which adapter.
            r (`int`), lora_alpha (`float`): those of this linear, patterns applied.
            scope (`GateScope`): whose gate this linear follows; the first linear in it holds the gate.
            owns_embedding (`bool`), owns_centroids (`bool`): whether this linear holds those.
        """
        for container in (self.mocle_gate, self.mocle_embedding, self.mocle_centroids):
            if adapter_name in container:
                del container[adapter_name]
        self.scopes[adapter_name] = scope
        num_stacked = config.num_experts + config.universal_expert
        self.add_experts(adapter_name, config, num_experts=num_stacked, r=r, lora_alpha=lora_alpha)
        if scope.gate_owner is None:
            scope.gate_owner = self
            self.mocle_gate[adapter_name] = ClusterRouter(
                config.cluster_embedding_dim,
                config.num_experts,
                top_k=config.top_k,
                bias=config.gate_bias,
                temperature=config.temperature,
                noise_std=config.noise_std,
                squared_gate=config.squared_gate,
                universal_expert=config.universal_expert,
            )
        if owns_embedding:
            self.mocle_embedding[adapter_name] = _new_embedding(config)
        if owns_centroids:
            self.mocle_centroids[adapter_name] = _new_centroids(config)
            scope.lookup.centroids_owner = self
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def route(
        self, adapter_name: str, x: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, Routed | None]:
        """Ask the gate, or take over what it decided for another linear of the same layer."""
        refuse_replica(self)
        if self.training and not torch.compiler.is_compiling():
            is_shared = self.scopes[adapter_name].lookup.config.cluster_embedding_scope == "model"
            refuse_reentrant_checkpointing_under_ddp(self.recorder, shares_parameters=is_shared)
        routed = self.scopes[adapter_name].route(self.name, x.shape[:-1], self.recorder, x.device)
        return hidden_states, routed

    def check_mergeable(self, adapter_name: str) -> torch.Tensor:
        """Raise `ValueError`: each cluster would need another weight."""
        raise ValueError(
            f"'{self.name}': experts that are chosen by the cluster of each example cannot be merged into one weight. "
            "Keep the adapter; or write an ordinary LoRA adapter for one cluster by `export_cluster_lora`, which is exact "
            "for it and can be merged; or, to drop the adapter, use `unload()`."
        )


def lookups_of(model: nn.Module) -> list[ClusterLookup]:
    """What finds the clusters for each MoCLE adapter of a model, each once."""
    layers = [module for module in model.modules() if isinstance(module, MoCLELayer)]
    return list(dict.fromkeys(scope.lookup for layer in layers for scope in layer.scopes.values()))


def _new_embedding(config: MoCLEConfig) -> ClusterEmbedding:
    embedding = ClusterEmbedding(config.num_clusters, config.cluster_embedding_dim)
    if config.cluster_embedding_init == "normal":
        embedding.reset_parameters(std=1.0)
    else:
        embedding.reset_parameters(std=1 / math.sqrt(config.cluster_embedding_dim))
        if config.centroids is not None and not embedding.weight.is_meta:
            embedding.weight.data.copy_(config.centroids)
    return embedding


def _new_centroids(config: MoCLEConfig) -> ClusterCentroids:
    centroids = ClusterCentroids(config.num_clusters, config.cluster_embedding_dim)
    if config.centroids is not None and not centroids.weight.is_meta:
        centroids.weight.copy_(config.centroids)
    return centroids
