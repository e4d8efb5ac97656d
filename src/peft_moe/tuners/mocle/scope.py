"""The gate that the linears of one layer share, and what it decided for a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...kernels import DispatchPlan
from ...routing import ClusterRouter, RouterOutput
from ...routing_recorder import RoutingRecorder
from ..experts_layer import Routed
from ..structure import is_gathered_when_called, is_sharded
from .clusters import BatchClusters, ClusterLookup


if TYPE_CHECKING:
    from .layer import MoCLELayer


class Decision:
    """What a gate decided for the N examples of a batch, and what kernels make of it for inputs of any shape."""

    def __init__(self, output: RouterOutput, clusters: BatchClusters, num_stacked: int) -> None:
        self.output = output
        self.clusters = clusters
        self.num_stacked = num_stacked
        self._routed: dict[tuple[int, int], Routed] = {}

    def routed(self, shape: torch.Size, batch_shape: torch.Size | None, module_name: str) -> Routed:
        """For a layer's input of this shape, without its last axis; see [`BatchClusters.rows`]."""
        segments = self.clusters.segments
        key = (shape.numel(), 0) if segments is not None else self.clusters.rows(shape, batch_shape, module_name)
        if key not in self._routed:
            self._routed[key] = self._by_token(key[0]) if segments is not None else self._by_example(*key)
        return self._routed[key]

    def _by_example(self, num_examples: int, tokens_per_example: int) -> Routed:
        index, weights = self.output.top_k_index, self.output.top_k_weights
        copies = num_examples // index.shape[0]
        if copies != 1:
            index = index.repeat_interleave(copies, dim=0)
            weights = None if weights is None else weights.repeat_interleave(copies, dim=0)
        if tokens_per_example == 0:
            index, weights, tokens_per_example = index[:0], None if weights is None else weights[:0], 1
        return Routed(DispatchPlan.from_index(index, self.num_stacked, tokens_per_example=tokens_per_example), weights)

    def _by_token(self, num_tokens: int) -> Routed:
        segments = self.clusters.segments
        assert segments is not None
        if segments.shape[0] != num_tokens:
            raise ValueError(
                f"The position_ids of this batch tell {segments.shape[0]} packed tokens, but a layer got {num_tokens}. "
                "Packed examples can be routed only in layers that see all their tokens."
            )
        index, weights = self.output.top_k_index, self.output.top_k_weights
        segments = segments.to(index.device)
        plan = DispatchPlan.from_index(index.index_select(0, segments), self.num_stacked)
        return Routed(plan, None if weights is None else weights.index_select(0, segments))


class GateScope:
    """The linears that follow one gate.

    The first of them that is called for a batch asks the gate, the others take over what it decided; so noise is drawn
    once, and what a recomputation by gradient checkpointing computes is what the first forward computed. Without
    gradients a decision is kept for the steps of one generation, which makes decoding cheap.

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
        self._forget()

    def _forget(self) -> None:
        self._decision: Decision | None = None
        self._waiting: set[str] = set()
        self._kept_with: list[tuple[nn.Module, str, torch.Tensor, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A decision belongs to a running forward; copies start without one."""
        return {**self.__dict__, "_decision": None, "_waiting": set(), "_kept_with": None}

    @property
    def adapter_name(self) -> str:
        """The adapter that this scope belongs to."""
        return self.lookup.adapter_name

    @property
    def gate(self) -> ClusterRouter:
        """The gate."""
        assert self.gate_owner is not None
        gate: ClusterRouter = self.gate_owner.mocle_gate[self.adapter_name]
        return gate

    def route(self, member: str, shape: torch.Size, recorder: RoutingRecorder, device: torch.device) -> Routed:
        """What `member` has to do with an input of this shape (without its last axis) on `device`."""
        clusters = self.lookup.of_running_pass(recorder)
        decision = self._decision
        if decision is None or decision.clusters is not clusters or member not in self._waiting:
            decision = self._keep(clusters, device) or self._decide(clusters, device)
            self._waiting = set(self.members)
            self._record(decision, recorder)
        self._waiting.discard(member)
        forward_pass = recorder.find_pass()
        batch_shape = None if forward_pass is None else forward_pass.inputs.get("batch_shape")
        routed = decision.routed(shape, batch_shape, member)
        if not self._waiting and self._kept_with is None:
            self._decision = None
        return routed

    def _keep(self, clusters: BatchClusters, device: torch.device) -> Decision | None:
        """The last decision, if it was for another step of the same generation and the weights are the same."""
        kept, decision = self._kept_with, self._decision
        if kept is None or decision is None or decision.clusters is not clusters or not self._may_keep():
            return None
        if decision.output.top_k_index.device != device:
            return None
        for module, name, tensor, version in kept:
            if module._parameters[name] is not tensor or tensor._version != version:
                return None
        return decision

    def _may_keep(self) -> bool:
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.gate.training)

    def _decide(self, clusters: BatchClusters, device: torch.device) -> Decision:
        self._decision = Decision(self.decide(clusters, device), clusters, self.gate.num_stacked)
        self._kept_with = None
        if clusters.is_expandable and self._may_keep():
            assert self.embedding_owner is not None
            modules = (self.gate, self.embedding_owner.mocle_embedding[self.adapter_name])
            tensors = [
                (module, name, p) for module in modules for name, p in module._parameters.items() if p is not None
            ]
            if not any(tensor.is_inference() for *_, tensor in tensors):
                self._kept_with = [(module, name, tensor, tensor._version) for module, name, tensor in tensors]
        return self._decision

    def _record(self, decision: Decision, recorder: RoutingRecorder) -> None:
        if recorder.needs_record(is_training=False):
            output = decision.output
            recorder.record(
                self.adapter_name,
                self.name,
                output,
                shape=output.router_logits.shape[:1],
                is_training=False,
                is_per_example=True,
            )

    def decide(self, clusters: BatchClusters, device: torch.device) -> RouterOutput:
        """Ask the gate about N examples; the answer is on `device`."""
        if clusters.ids is not None:
            return _moved(self._ask(clusters), device)
        output = self.gate.universal_only(1, device)
        if not (torch.is_grad_enabled() and self.gate.weight.requires_grad):
            return output
        # asked in vain: each rank of a distributed run takes part in the gradient of every parameter
        asked = self._ask(BatchClusters(torch.zeros(1, dtype=torch.int64, device=device)))
        assert asked.top_k_weights is not None
        weights = 1 + 0 * asked.top_k_weights[:, -1:].to(device)
        return RouterOutput(output.router_logits, output.top_k_index, weights, balance_index=output.balance_index)

    def _ask(self, clusters: BatchClusters) -> RouterOutput:
        """What the gate says about examples whose clusters are known."""
        assert self.embedding_owner is not None and clusters.ids is not None
        gate = self.gate
        embedding = self.embedding_owner.mocle_embedding[self.adapter_name]
        if is_sharded(embedding.weight) and not is_gathered_when_called(embedding):
            raise RuntimeError(
                f"The layers of the MoCLE adapter {self.adapter_name!r} share a table of cluster embeddings, but FSDP holds it "
                f"in the group of the first one, and '{self.name}' cannot read it. Give it a group of its own: "
                "fully_shard(module) for each ClusterEmbedding before the layers (in a config of accelerate: add "
                "ClusterEmbedding to fsdp_transformer_layer_cls_to_wrap). Or use cluster_embedding_scope='layer'."
            )
        embedded = embedding(clusters.ids_on(_device_of(embedding.weight, clusters.ids)))
        return gate(embedded.to(_device_of(gate.weight, embedded)))


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
