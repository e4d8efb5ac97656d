"""A frozen linear with LoRA experts that the cluster of an example chooses, and the gate that linears share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...kernels import DispatchPlan
from ...routing import ClusterCentroids, ClusterEmbedding, ClusterRouter, RouterOutput
from ...routing_recorder import RoutingRecorder
from ..base import refuse_reentrant_checkpointing_under_ddp, refuse_replica
from ..lora_layer import Dispatch, LoraExpertsLayer
from ..structure import is_gathered_when_called, is_sharded
from .clusters import BatchClusters, ClusterLookup
from .config import MoCLEConfig


class MoCLELayer(LoraExpertsLayer):
    """A linear with stacked LoRA experts, the universal one last.

    Keys of a saved adapter, C clusters, E experts: `mocle_A.weight` `(E + 1, R, D)`, `mocle_B.weight` `(E + 1, R, O)`;
    in the first linear of each layer `mocle_gate.weight` `(E, C')` and perhaps `mocle_gate.bias` `(E,)`; in the first
    linear of the model (by default) `mocle_embedding.weight` `(C, C')` and `mocle_centroids.weight` `(C, C')`.
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
        self.mocle_A = nn.ModuleDict()
        self.mocle_B = nn.ModuleDict()
        self.mocle_dropout = nn.ModuleDict()
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
        """Add an adapter, or replace one of the same name; not yet on the right device.

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
            self.mocle_centroids[adapter_name] = scope.lookup.centroids = _new_centroids(config)

    def dispatch(
        self, adapter_name: str, x: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, Dispatch | None]:
        """Ask the gate, or take over what it decided for another linear of the same layer."""
        refuse_replica(self)
        if self.training and not torch.compiler.is_compiling():
            is_shared = self.scopes[adapter_name].lookup.config.cluster_embedding_scope == "model"
            refuse_reentrant_checkpointing_under_ddp(self.recorder, shares_parameters=is_shared)
        return hidden_states, self.scopes[adapter_name].dispatch(self.name, x.shape[:-1], self.recorder, x.device)

    def check_mergeable(self, adapter_name: str) -> torch.Tensor:
        """Raise `ValueError`: each cluster would need another weight."""
        raise ValueError(
            f"'{self.name}': experts that are chosen by the cluster of each example cannot be merged into one weight. "
            "Keep the adapter; or write an ordinary LoRA adapter for one cluster by `export_cluster_lora`, which is "
            "exact for it and can be merged; or, to drop the adapter, use `unload()`."
        )


class _Dispatches:
    """What kernels make of a gate's answer about the N examples of a batch, for inputs of any shape."""

    def __init__(self, output: RouterOutput, clusters: BatchClusters, num_stacked: int) -> None:
        self.output = output
        self.clusters = clusters
        self.num_stacked = num_stacked
        self._known: dict[tuple[int, int], Dispatch] = {}

    def of(self, shape: torch.Size, batch_shape: torch.Size | None, module_name: str) -> Dispatch:
        """For a layer's input of this shape, without its last axis; see [`BatchClusters.rows`]."""
        segments = self.clusters.segments
        key = (shape.numel(), 0) if segments is not None else self.clusters.rows(shape, batch_shape, module_name)
        if key not in self._known:
            self._known[key] = self._by_example(*key) if segments is None else self._by_token(key[0], segments)
        return self._known[key]

    def _by_example(self, num_examples: int, tokens_per_example: int) -> Dispatch:
        index, weights = self.output.top_k_index, self.output.top_k_weights
        copies = num_examples // index.shape[0]
        if copies != 1:
            index = index.repeat_interleave(copies, dim=0)
            weights = None if weights is None else weights.repeat_interleave(copies, dim=0)
        if tokens_per_example == 0:
            index, weights, tokens_per_example = index[:0], None if weights is None else weights[:0], 1
        return Dispatch(
            DispatchPlan.from_index(index, self.num_stacked, tokens_per_example=tokens_per_example), weights
        )

    def _by_token(self, num_tokens: int, segments: torch.Tensor) -> Dispatch:
        if segments.shape[0] != num_tokens:
            raise ValueError(
                f"The position_ids of this batch tell {segments.shape[0]} packed tokens, but a layer got "
                f"{num_tokens}. Packed examples can be routed only in layers that see all their tokens."
            )
        index, weights = self.output.top_k_index, self.output.top_k_weights
        segments = segments.to(index.device)
        plan = DispatchPlan.from_index(index.index_select(0, segments), self.num_stacked)
        return Dispatch(plan, None if weights is None else weights.index_select(0, segments))


class GateScope:
    """The linears that follow one gate.

    The first of them that is called for a batch asks the gate, the others take over its answer: so noise is drawn
    once, and what a recomputation by gradient checkpointing computes is what the first forward computed. A call of
    `generate` asks once for all of its steps.

    Args:
        name (`str`): name of the layer (of the linear, with `gate_scope="module"`).
        lookup (`ClusterLookup`): that of the adapter.
    """

    def __init__(self, name: str, lookup: ClusterLookup) -> None:
        self.name = name
        self.lookup = lookup
        self.members: list[str] = []
        self.gate_owner: MoCLELayer | None = None
        self.embedding_owner: MoCLELayer | None = None
        self._answer: _Dispatches | None = None
        self._waiting: set[str] = set()
        """members that have not asked for the answer yet"""

    def __getstate__(self) -> dict[str, Any]:
        """An answer belongs to a running forward; copies start without one."""
        return {**self.__dict__, "_answer": None, "_waiting": set()}

    # owners, and not the modules themselves: FSDP puts a wrapper in the place of a module
    @property
    def gate(self) -> ClusterRouter:
        """The gate."""
        assert self.gate_owner is not None
        gate: ClusterRouter = self.gate_owner.mocle_gate[self.lookup.adapter_name]
        return gate

    @property
    def embedding(self) -> ClusterEmbedding:
        """The table of cluster embeddings."""
        assert self.embedding_owner is not None
        embedding: ClusterEmbedding = self.embedding_owner.mocle_embedding[self.lookup.adapter_name]
        return embedding

    def dispatch(self, member: str, shape: torch.Size, recorder: RoutingRecorder, device: torch.device) -> Dispatch:
        """What `member` has to do with an input of this shape (without its last axis) on `device`."""
        clusters = self.lookup.of_running_pass(recorder.context)
        forward_pass = recorder.context.find_pass()
        answer = self._answer
        if answer is None or answer.clusters is not clusters or member not in self._waiting:
            generation = None if forward_pass is None else forward_pass.surrounding
            answer = self._ask_once(clusters, device, {} if generation is None else generation.state)
            self._waiting = set(self.members)
            self._record(answer.output, recorder)
        self._waiting.discard(member)
        self._answer = answer if self._waiting else None
        return answer.of(shape, None if forward_pass is None else forward_pass.inputs.get("batch_shape"), member)

    def _ask_once(self, clusters: BatchClusters, device: torch.device, generation: dict[Any, Any]) -> _Dispatches:
        """The answer, kept with the generation whose clusters these are: its weights do not change in between."""
        is_kept = generation.get(self.lookup) is clusters and not self.gate.training
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_kept:
            generation = {}
        if (self, device) not in generation:
            generation[self, device] = _Dispatches(self.decide(clusters, device), clusters, self.gate.num_stacked)
        answer: _Dispatches = generation[self, device]
        return answer

    def _record(self, output: RouterOutput, recorder: RoutingRecorder) -> None:
        if recorder.needs_record(is_training=False):
            shape = output.router_logits.shape[:1]
            recorder.record(
                self.lookup.adapter_name, self.name, output, shape=shape, is_training=False, is_per_example=True
            )

    def decide(self, clusters: BatchClusters, device: torch.device) -> RouterOutput:
        """Ask the gate about N examples; the answer is on `device`."""
        if clusters.ids is not None:
            return _moved(self._ask(clusters), device)
        output = self.gate.universal_only(1, device)
        if not (torch.is_grad_enabled() and self.gate.weight.requires_grad):
            return output
        # an answer of weight 0: under DDP every parameter needs a gradient on each rank
        unused = self._ask(BatchClusters(torch.zeros(1, dtype=torch.int64, device=device)))
        assert unused.top_k_weights is not None
        weights = 1 + 0 * unused.top_k_weights[:, -1:].to(device)
        return RouterOutput(output.router_logits, output.top_k_index, weights, balance_index=output.balance_index)

    def _ask(self, clusters: BatchClusters) -> RouterOutput:
        """What the gate says about examples whose clusters are known."""
        assert clusters.ids is not None
        gate, embedding = self.gate, self.embedding
        if is_sharded(embedding.weight) and not is_gathered_when_called(embedding):
            raise RuntimeError(
                f"The layers of the MoCLE adapter {self.lookup.adapter_name!r} share a table of cluster embeddings, "
                f"but FSDP holds it in the group of the first one, and '{self.name}' cannot read it. Give it a group "
                "of its own: fully_shard(module) for each ClusterEmbedding before the layers (in a config of "
                "accelerate: add ClusterEmbedding to fsdp_transformer_layer_cls_to_wrap). Or use "
                "cluster_embedding_scope='layer'."
            )
        embedded = embedding(clusters.ids_on(_device_of(embedding.weight, clusters.ids)))
        return gate(embedded.to(_device_of(gate.weight, embedded)))


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


def _device_of(weight: torch.Tensor, otherwise: torch.Tensor) -> torch.device:
    """Where a module computes; an offloaded weight is on no device until the module is called."""
    return otherwise.device if weight.is_meta else weight.device


def _moved(output: RouterOutput, device: torch.device) -> RouterOutput:
    """The same decision on the device of the layer that acts on it."""
    if output.top_k_index.device == device:
        return output
    weights, counted = output.top_k_weights, output.balance_index
    return RouterOutput(
        output.router_logits.to(device),
        output.top_k_index.to(device),
        None if weights is None else weights.to(device),
        None if counted is None else counted.to(device),
    )
