"""`RoutingRecorder`: the one side channel, from the routers of a model to its auxiliary loss and its expert load.

A *forward pass* begins when the base model is called and ends when that call returns. Routers that run in between add
one record each. Whatever runs outside is a recomputation by gradient checkpointing (or a direct call of a submodule)
and records nothing, so counts are exact; it only looks up the pass that it belongs to.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .losses import RoutingStatistics, routing_statistics
from .model_output import differentiable_outputs
from .routing import RouterOutput


OutputHook = Callable[["RoutingRecorder", "ForwardPass", Any], Any]

_INPUT_NAMES = (
    "attention_mask",
    "decoder_attention_mask",
    "input_ids",
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "position_ids",
)

CACHE_NOTES = "_peft_moe_notes"
"""attribute of a key-value cache: what tuners want to know again when a later pass continues it"""


class AuxLossState:
    """What `aux_loss.py` knows about a pass: how much its loss weighs, and the gradient that this gives."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | float | None = None
        """gradient of the objective with respect to the mean loss of this pass; known once backward has begun"""
        self.is_claimed = False
        """whether the auxiliary loss reaches backward by another way than injection"""
        self.is_compiled = False
        """whether a router ran in a compiled graph, where nothing can be injected"""
        self.gradients: dict[str, dict[str, RoutingStatistics]] = {}
        """gradient of the auxiliary loss with respect to the statistics of each router, filled once"""
        self.elsewhere: dict[str, dict[str, RoutingStatistics]] = {}
        """what the other processes recorded, `(1, E)`, for adapters whose loss is over all of them"""


@dataclass(frozen=True)
class Route:
    """Where one router sent its tokens.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64): the choices that load balancing counts.
        token_mask (`torch.Tensor` of shape `(B, S)`, `B · S = T`): 0 for padding.
    """

    top_k_index: torch.Tensor
    token_mask: torch.Tensor


class ForwardPass:
    """What one call of the base model left behind: its inputs that matter here, and one record per router.

    Holds no tensor with a graph, so that the graph may hold it. Dictionaries go adapter name → router name → value.

    Args:
        inputs (`dict[str, Any]`): arguments of the call, by name; `batch_shape`, examples and tokens of the call; and of a
            key-value cache `num_cached_tokens` and `cache_notes` as they were when the pass began.
        has_gradient (`bool`): whether gradients were enabled when it began.
    """

    def __init__(self, inputs: dict[str, Any], *, has_gradient: bool) -> None:
        self.inputs = inputs
        self.has_gradient = has_gradient
        self.surrounding: ForwardPass | None = None
        """what [`RoutingRecorder.surround`] said when it began"""
        self.is_open = True
        self.is_awaited = False
        """whether a router ran in training, so that backward will ask for what this pass holds"""
        self.records: dict[str, dict[str, RoutingStatistics]] = {}
        self.routes: dict[str, dict[str, Route]] = {}
        """kept only while somebody listens, and until they have been told"""
        self.aux_loss = AuxLossState()
        self.num_recomputed: dict[tuple[str, str], int] = {}
        self.derived: dict[object, Any] = {}
        """what a tuner works out from the inputs once and wants back in every layer, under a key of its own"""

    def token_mask(self, shape: torch.Size, *, is_decoder: bool, router_logits: torch.Tensor) -> torch.Tensor:
        """Which of the tokens behind `router_logits` `(T, E)` count: shape `(B, S)`, 0 for padding.

        A padding mask that covers the key-value cache too is cut to the last S positions. One of any other shape
        belongs to other tokens (those of an encoder, or image patches), and then every token counts. `generate` makes a
        causal mask `(B, 1, S, cache)` of it for a static cache.

        Args:
            shape (`torch.Size`): leading axes of the hidden states, `(B, S)` or `(T,)`.
            is_decoder (`bool`): whether they belong to the decoder of an encoder-decoder model.
        """
        mask = self.inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            if len(shape) == 1 and mask.numel() == shape[0]:
                return mask.ne(0)
            if len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
                return mask[:, -shape[1] :].ne(0)
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and len(shape) == 2 and mask.shape[2] == shape[1]:
            return _visible_tokens(mask, shape[1])
        return router_logits.new_ones(*(shape if len(shape) == 2 else (1, router_logits.shape[0])))

    def record_name(self, adapter_name: str, router_name: str) -> str | None:
        """The record that a router's running call belongs to, or `None` if it left none.

        While the pass is open that is its newest record. In a recomputation, where a block that is used several times
        comes back last call first, it is the newest one that has not been asked for.
        """
        records = self.records.get(adapter_name, {})
        names = [name for name in records if name == router_name or name.startswith(f"{router_name}#")]
        if not names:
            return None
        if self.is_open:
            return names[-1]
        asked = self.num_recomputed.get((adapter_name, router_name), 0)
        self.num_recomputed[adapter_name, router_name] = asked + 1
        return names[-1 - asked % len(names)]


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
    """Collects what the routers of a model decide, one [`ForwardPass`] after the other.

    One recorder serves all adapters of a base model. It is attached by [`install_recorder`] and found again by
    [`get_recorder`].
    """

    def __init__(self) -> None:
        self.output_hooks: list[OutputHook] = []
        """called with the recorder, each completed pass and the model's output; each may return another output"""
        self.router_inputs: set[str] = set()
        """arguments of the base model that are for its routers only, and that its forward never sees"""
        self._start_process()

    def _start_process(self) -> None:
        self.listeners: list[Callable[[ForwardPass], None]] = []
        """called with each completed pass; while there is one, passes without gradient are recorded too"""
        self.current: ForwardPass | None = None
        self.latest: ForwardPass | None = None
        self.in_backward: ForwardPass | None = None
        self.surrounding: ForwardPass | None = None
        self.opened_at = 0
        self.thread: int | None = None
        self.num_nested = 0
        self.live: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        """logits with their graph, counted choices and token mask of each router of the latest pass; dropped when
        backward or the next pass begins"""

    def __getstate__(self) -> dict[str, Any]:
        """Passes and listeners belong to a running process: copies and pickles of a model start without any."""
        return {"output_hooks": self.output_hooks, "router_inputs": self.router_inputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()

    def begin(self, inputs: dict[str, Any], *, depth: int = 0) -> None:
        """Open a pass. A call within it (the backbone of a language model) belongs to it and opens none.

        Args:
            inputs (`dict[str, Any]`): see [`ForwardPass`].
            depth (`int`): how deep the called module lies: 0 is the base model, 1 its backbone.

        Raises:
            RuntimeError: another thread is using the model.
        """
        self._enter_thread()
        if self.current is not None and depth > self.opened_at:
            self.num_nested += 1
            return
        # a pass that is still open here was interrupted (KeyboardInterrupt): torch then calls no hook
        self.num_nested = 0
        if self.surrounding is not None:
            inputs = {**self.surrounding.inputs, **inputs}
        self.current = ForwardPass(inputs, has_gradient=torch.is_grad_enabled())
        self.current.surrounding = self.surrounding
        self.opened_at = depth
        self.in_backward = None
        self.live = {}

    def _enter_thread(self) -> None:
        """Refuse a second thread while the first one is inside the model: they would get each other's routing."""
        if torch.compiler.is_compiling():
            return
        mine = threading.get_ident()
        is_busy = self.current is not None or self.surrounding is not None
        if is_busy and self.thread != mine and any(other.ident == self.thread for other in threading.enumerate()):
            raise RuntimeError(
                "Two threads call a model with peft_moe adapters at the same time, and its routers would mix up their "
                "batches. Let one call end before the next begins, or give each thread a copy of the model."
            )
        self.thread = mine

    @contextmanager
    def surround(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within this context every pass has these inputs unless it brings its own, and so has what runs outside any
        pass: an encoder or a language model that `generate` calls directly."""
        self._enter_thread()
        before = self.surrounding
        outer = before.inputs if before is not None else {}
        self.surrounding = ForwardPass({**outer, **inputs}, has_gradient=torch.is_grad_enabled())
        try:
            yield
        finally:
            self.surrounding = before

    def end(self, output: Any) -> Any:
        """Close the pass, run the hooks, tell the listeners, return the model's output (`None`: its forward raised)."""
        if self.num_nested:
            self.num_nested -= 1
            return output
        finished, self.current = self.current, None
        if finished is None:
            return output
        finished.is_open = False
        forward_raised = output is None
        if forward_raised:
            self.live = {}
        if forward_raised or not (finished.records or finished.is_awaited or finished.derived):
            return output
        if finished.is_awaited:
            self.latest = finished
            self._announce_backward(finished, output)
        for hook in self.output_hooks:
            output = hook(self, finished, output)
        for listener in self.listeners:
            listener(finished)
        finished.routes = {}
        return output

    def _announce_backward(self, finished: ForwardPass, output: Any) -> None:
        """Let a recomputation find the pass that it belongs to, if several passes wait for their backward."""
        if not torch.compiler.is_compiling():
            for _, tensor in differentiable_outputs(output):
                tensor.register_hook(_BackwardBegins(self, finished))  # type: ignore[no-untyped-call]

    def needs_record(self, *, is_training: bool) -> bool:
        """Whether a router that runs now has to call [`record`]: generation and evaluation stay free of cost."""
        has_gradient = self.current is not None and self.current.has_gradient
        return self.current is not None and (bool(self.listeners) or (is_training and has_gradient))

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
        forward_pass = self.current
        if forward_pass is None:
            raise RuntimeError("RoutingRecorder.record was called outside a forward pass; ask needs_record first.")
        if is_per_example:
            mask = output.router_logits.new_ones(output.router_logits.shape[0], 1)
        else:
            mask = forward_pass.token_mask(shape, is_decoder=is_decoder, router_logits=output.router_logits)
        by_router = forward_pass.records.setdefault(adapter_name, {})
        name = _unique(router_name, by_router)
        # without a graph: non-reentrant checkpointing demands that a recomputation saves the very same tensors
        with torch.no_grad():
            by_router[name] = routing_statistics(output.router_logits, output.counted_index, mask)
        if self.listeners:
            forward_pass.routes.setdefault(adapter_name, {})[name] = Route(output.counted_index, mask)
        if is_training and forward_pass.has_gradient:
            forward_pass.is_awaited = True
            if output.router_logits.requires_grad:
                self.live.setdefault(adapter_name, {})[name] = (output.router_logits, output.counted_index, mask)

    def live_statistics(self) -> dict[str, dict[str, RoutingStatistics]]:
        """Statistics of the latest pass with their graph, adapter name → router name → statistics."""
        return {
            adapter_name: {
                name: routing_statistics(logits, index, mask) for name, (logits, index, mask) in by_router.items()
            }
            for adapter_name, by_router in self.live.items()
        }

    def find_pass(self) -> ForwardPass | None:
        """The pass that the running code belongs to: the open one, in a recomputation the one whose backward runs (or
        the latest, if its backward did not come through the model's outputs), else what [`surround`] says, else none.
        """
        if self.current is not None:
            return self.current
        is_in_backward = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
        return (self.in_backward or self.latest) if is_in_backward else self.surrounding


def _unique(name: str, taken: dict[str, Any]) -> str:
    """A router that runs twice in one pass (a block that is reused) leaves two records."""
    if name not in taken:
        return name
    repeat = 2
    while f"{name}#{repeat}" in taken:
        repeat += 1
    return f"{name}#{repeat}"


class _BackwardBegins:
    """Tensor hook on an output of the base model. Refers to the recorder weakly: the graph must not keep alive what
    keeps the graph alive."""

    def __init__(self, recorder: RoutingRecorder, forward_pass: ForwardPass) -> None:
        self.recorder = weakref.ref(recorder)
        self.forward_pass = forward_pass

    def __call__(self, gradient: torch.Tensor) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.in_backward = self.forward_pass
            recorder.live = {}


class _BeginPass:
    """Forward pre-hook of the base model; an object, so that it survives deepcopy and pickle."""

    def __init__(self, recorder: RoutingRecorder, positions: dict[str, int], depth: int) -> None:
        self.recorder = recorder
        self.positions = positions
        self.depth = depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def given(name: str) -> Any:
            position = self.positions.get(name)
            value = kwargs.get(name)
            return args[position] if value is None and position is not None and position < len(args) else value

        inputs = {name: value for name in _INPUT_NAMES if (value := given(name)) is not None}
        router_inputs = self.recorder.router_inputs
        if not router_inputs:
            self.recorder.begin(inputs, depth=self.depth)
            return None
        for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
            if isinstance(tokens := given(name), torch.Tensor) and tokens.dim() > 1:
                inputs["batch_shape"] = tokens.shape[:2]
                break
        for_routers = {name: kwargs[name] for name in router_inputs if name in kwargs}
        if not for_routers and self.recorder.surrounding is None:
            inputs |= cache_state(given("past_key_values"))
        self.recorder.begin({**inputs, **{n: v for n, v in for_routers.items() if v is not None}}, depth=self.depth)
        if not for_routers:
            return None
        return args, {name: value for name, value in kwargs.items() if name not in for_routers}


def cache_state(cache: Any) -> dict[str, Any]:
    """What a pass, or a generation, has to know of the cache that it continues; nothing where there is no cache."""
    if not hasattr(cache, "get_seq_length"):
        return {}
    num_cached_tokens = int(cache.get_seq_length())
    notes = getattr(cache, CACHE_NOTES, {}) if num_cached_tokens else {}
    return {"num_cached_tokens": num_cached_tokens, "cache_notes": notes}


class _EndPass:
    """Forward hook of the base model, also called when its forward raised."""

    def __init__(self, recorder: RoutingRecorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.recorder.end(output)


def get_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder of a model or of the base model inside it (a `PeftModel`, a DDP wrapper), or `None`."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _BeginPass):
                return hook.recorder
    return None


def install_recorder(base_model: nn.Module) -> RoutingRecorder:
    """Return the recorder of `base_model`, attaching a new one by forward hooks if there is none."""
    for hook in base_model._forward_pre_hooks.values():
        if isinstance(hook, _BeginPass):
            return hook.recorder
    recorder = RoutingRecorder()
    for depth, module in enumerate(_entrances(base_model)):
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        positions = {name: position for position, name in enumerate(parameters)}
        module.register_forward_pre_hook(_BeginPass(recorder, positions, depth), with_kwargs=True)
        module.register_forward_hook(_EndPass(recorder), always_call=True)
    return recorder


def _entrances(base_model: nn.Module) -> list[nn.Module]:
    """The model itself and its backbone, which value heads and chunked losses call directly."""
    backbone = getattr(base_model, "base_model", None)
    if isinstance(backbone, nn.Module) and backbone is not base_model:
        return [base_model, backbone]
    return [base_model]


def remove_recorder(base_model: nn.Module) -> None:
    """Detach the recorder from `base_model`."""
    for module in _entrances(base_model):
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for handle, hook in list(hooks.items()):
                if isinstance(hook, _BeginPass | _EndPass):
                    del hooks[handle]
                    flags.pop(handle, None)
