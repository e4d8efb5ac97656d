"""`RoutingRecorder`: what the routers of a model decide, for its auxiliary loss and its expert load.

Routers that run in a forward pass add one record each. A recomputation by gradient checkpointing records nothing, so
that counts are exact; it only looks up the record that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .forward_context import ForwardContext, ForwardPass, get_context, install_context
from .routing import RouterOutput


class RoutingStatistics(NamedTuple):
    """Sums over the tokens that one router saw in one forward pass, per sample.

    Args:
        expert_counts (`torch.Tensor` of shape `(B, E)`, float32, without gradient):
            How often each expert was among the chosen ones.
        probability_sums (`torch.Tensor` of shape `(B, E)`, float32):
            Sum of the softmax probabilities.
        squared_logsumexp_sums (`torch.Tensor` of shape `(B,)`, float32):
            Sum of `logsumexp(logits)²`.
        num_tokens (`torch.Tensor` of shape `(B,)`, float32, without gradient):
            Number of tokens that are not padding.
    """

    expert_counts: torch.Tensor
    probability_sums: torch.Tensor
    squared_logsumexp_sums: torch.Tensor
    num_tokens: torch.Tensor

    def to(self, device: torch.device) -> RoutingStatistics:
        """The same on another device, for routers of a model that is spread over several."""
        if self.num_tokens.device == device:
            return self
        return RoutingStatistics(*(part.to(device) for part in self))


def routing_statistics(
    router_logits: torch.Tensor, top_k_index: torch.Tensor, token_mask: torch.Tensor | None = None
) -> RoutingStatistics:
    """Sum up what a router decided; differentiable in `router_logits`.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`, float32)
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64)
        token_mask (`torch.Tensor` of shape `(B, S)` with `B · S = T`, *optional*):
            1 for tokens that count and 0 for padding. Its first axis says which tokens belong to one sample; without
            a mask the whole batch is one sample.
    """
    num_experts = router_logits.shape[-1]
    if token_mask is None:
        token_mask = router_logits.new_ones(1, router_logits.shape[0])
    mask = token_mask.to(device=router_logits.device, dtype=torch.float32)
    num_samples, num_positions = mask.shape
    logits = router_logits.float()
    probabilities = torch.softmax(logits, dim=-1).view(num_samples, num_positions, num_experts)
    squared_logsumexp = torch.logsumexp(logits, dim=-1).square().view(num_samples, num_positions)
    with torch.no_grad():
        index = top_k_index.reshape(num_samples, -1)
        weight = mask.unsqueeze(-1).expand(-1, -1, top_k_index.shape[-1]).reshape(num_samples, -1)
        expert_counts = torch.zeros(num_samples, num_experts, device=mask.device).scatter_add_(1, index, weight)
    return RoutingStatistics(
        expert_counts=expert_counts,
        # no einsum: autocast would compute it, and so store the gradient, in half precision
        probability_sums=(mask.unsqueeze(-1) * probabilities).sum(dim=1),
        squared_logsumexp_sums=(mask * squared_logsumexp).sum(dim=-1),
        num_tokens=mask.sum(dim=-1),
    )


@dataclass(frozen=True)
class RouterRecord:
    """What one router decided in one forward pass.

    Args:
        statistics (`RoutingStatistics`): sums over its tokens, without a graph.
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64, or `None`): the choices that load balancing counts. Kept
            only while somebody listens, and until they have been told.
        token_mask (`torch.Tensor` of shape `(B, S)`, `B · S = T`, or `None`): 0 for padding; likewise.
    """

    statistics: RoutingStatistics
    top_k_index: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None


class _PassRecords:
    """What the recorder keeps of a pass; adapter name → router name → record."""

    def __init__(self) -> None:
        self.by_adapter: dict[str, dict[str, RouterRecord]] = {}
        self.num_recomputed: dict[tuple[str, str], int] = {}


def records_of(forward_pass: ForwardPass) -> dict[str, dict[str, RouterRecord]]:
    """The records of a pass, adapter name → router name → record; empty if no router left one."""
    found = forward_pass.state.get(_PassRecords)
    return {} if found is None else found.by_adapter


def statistics_of(forward_pass: ForwardPass) -> dict[str, dict[str, RoutingStatistics]]:
    """The statistics of a pass without a graph, adapter name → router name → statistics."""
    return {
        adapter_name: {name: record.statistics for name, record in by_router.items()}
        for adapter_name, by_router in records_of(forward_pass).items()
    }


def record_name(forward_pass: ForwardPass, adapter_name: str, router_name: str) -> str | None:
    """The record that a router's running call belongs to, or `None` if it left none.

    While the pass is open that is its newest record. In a recomputation, where a block that is used several times
    comes back last call first, it is the newest one that has not been asked for.
    """
    records = records_of(forward_pass).get(adapter_name, {})
    names = [name for name in records if name == router_name or name.startswith(f"{router_name}#")]
    if not names:
        return None
    if forward_pass.is_open:
        return names[-1]
    num_recomputed = forward_pass.state_of(_PassRecords).num_recomputed
    asked = num_recomputed.get((adapter_name, router_name), 0)
    num_recomputed[adapter_name, router_name] = asked + 1
    return names[-1 - asked % len(names)]


def token_mask(
    forward_pass: ForwardPass, shape: torch.Size, *, is_decoder: bool, router_logits: torch.Tensor
) -> torch.Tensor:
    """Which of the tokens behind `router_logits` `(T, E)` count: shape `(B, S)`, 0 for padding.

    A padding mask that covers the key-value cache too is cut to the last S positions. One of any other shape belongs
    to other tokens (those of an encoder, or image patches), and then every token counts. `generate` makes a causal
    mask `(B, 1, S, cache)` of it for a static cache.

    Args:
        forward_pass (`ForwardPass`): its inputs hold the padding mask.
        shape (`torch.Size`): leading axes of the hidden states, `(B, S)` or `(T,)`.
        is_decoder (`bool`): whether they belong to the decoder of an encoder-decoder model.
    """
    mask = forward_pass.inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if len(shape) == 1 and mask.numel() == shape[0]:
            return mask.ne(0)
        if len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            return mask[:, -shape[1] :].ne(0)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and len(shape) == 2 and mask.shape[2] == shape[1]:
        return _visible_tokens(mask, shape[1])
    return router_logits.new_ones(*(shape if len(shape) == 2 else (1, router_logits.shape[0])))


def _visible_tokens(causal_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Which of the newest tokens the very last one sees: `(B, S)`, 0 for padding on the left.

    Args:
        causal_mask (`torch.Tensor` of shape `(B, 1, S, cache)`): true, or 0 where it is added to scores, if visible.
    """
    row = causal_mask[:, 0, -1]
    is_visible = row if row.dtype == torch.bool else row.eq(0)
    position = torch.arange(row.shape[1], device=row.device)
    last = (is_visible * position).amax(dim=1, keepdim=True)
    newest = last - num_tokens + 1 + torch.arange(num_tokens, device=row.device)
    return is_visible.gather(1, newest.clamp(min=0))


class RoutingRecorder:
    """Collects what the routers of a model decide, in the passes of its [`ForwardContext`]; an output hook of it.

    One recorder serves all adapters of a base model. It is attached by [`install_recorder`] and found again by
    [`get_recorder`].

    Args:
        context (`ForwardContext`): that of the base model.
    """

    def __init__(self, context: ForwardContext) -> None:
        self.context = context
        self.listeners: list[Callable[[ForwardPass], None]] = []
        """called with each completed pass; while there is one, passes without gradient are recorded too"""
        context.output_hooks.append(self)

    def __getstate__(self) -> dict[str, Any]:
        """Listeners belong to a running process: copies and pickles of a model start without any."""
        return {"context": self.context, "listeners": []}

    def __call__(self, context: ForwardContext, forward_pass: ForwardPass, output: Any) -> Any:
        """Tell the listeners of a completed pass, and keep none of its choices."""
        if self.listeners and _PassRecords in forward_pass.state:
            for listener in self.listeners:
                listener(forward_pass)
            forward_pass.state_of(_PassRecords).by_adapter = {
                adapter_name: {name: RouterRecord(entry) for name, entry in by_router.items()}
                for adapter_name, by_router in statistics_of(forward_pass).items()
            }
        return output

    def needs_record(self, *, is_training: bool) -> bool:
        """Whether a router that runs now has to call [`record`]: generation and evaluation stay free of cost."""
        current = self.context.current
        return current is not None and (bool(self.listeners) or (is_training and current.has_gradient))

    def record(
        self,
        adapter_name: str,
        router_name: str,
        output: RouterOutput,
        *,
        shape: torch.Size,
        is_training: bool,
        is_decoder: bool = False,
        is_per_example: bool = False,
    ) -> None:
        """Add what a router decided to the open pass.

        Args:
            adapter_name (`str`), router_name (`str`): whose decision it is.
            output (`RouterOutput`): the decision for T tokens.
            shape (`torch.Size`): leading axes of the hidden states, `(B, S)` or `(T,)`.
            is_training (`bool`): whether an auxiliary loss is wanted.
            is_decoder (`bool`): whether the router sits in the decoder of an encoder-decoder model.
            is_per_example (`bool`): whether it routes whole examples. Padding then plays no part.

        Raises:
            RuntimeError: no pass is open; ask [`needs_record`] first.
        """
        forward_pass = self.context.current
        if forward_pass is None:
            raise RuntimeError("RoutingRecorder.record was called outside a forward pass; ask needs_record first.")
        logits, index = output.router_logits, output.counted_index
        if is_per_example:
            mask = logits.new_ones(logits.shape[0], 1)
        else:
            mask = token_mask(forward_pass, shape, is_decoder=is_decoder, router_logits=logits)
        by_router = forward_pass.state_of(_PassRecords).by_adapter.setdefault(adapter_name, {})
        name = _unique(router_name, by_router)
        # without a graph: non-reentrant checkpointing demands that a recomputation saves the very same tensors
        with torch.no_grad():
            statistics = routing_statistics(logits, index, mask)
        by_router[name] = RouterRecord(statistics, index, mask) if self.listeners else RouterRecord(statistics)
        if is_training and forward_pass.has_gradient:
            forward_pass.keep_for_backward()
            if logits.requires_grad:
                live = self.context.graph_state.setdefault(RoutingRecorder, {})
                live.setdefault(adapter_name, {})[name] = (logits, index, mask)

    def live_statistics(self) -> dict[str, dict[str, RoutingStatistics]]:
        """Statistics of the latest pass with their graph, adapter name → router name → statistics."""
        return {
            adapter_name: {name: routing_statistics(*kept) for name, kept in by_router.items()}
            for adapter_name, by_router in self.context.graph_state.get(RoutingRecorder, {}).items()
        }


def _unique(name: str, taken: dict[str, Any]) -> str:
    """A router that runs twice in one pass (a block that is reused) leaves two records."""
    if name not in taken:
        return name
    repeat = 2
    while f"{name}#{repeat}" in taken:
        repeat += 1
    return f"{name}#{repeat}"


def get_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder of a model or of the base model inside it (a `PeftModel`, a DDP wrapper), or `None`."""
    context = get_context(model)
    return None if context is None else context.find_hook(RoutingRecorder)


def install_recorder(base_model: nn.Module) -> RoutingRecorder:
    """Return the recorder of `base_model`, adding a new one, on its forward context, if there is none."""
    context = install_context(base_model)
    return context.find_hook(RoutingRecorder) or RoutingRecorder(context)
