"""The forward context of a model: which forward pass the running code belongs to, and what is kept for it.

A *forward pass* begins when the base model is called and ends when that call returns. Whatever runs outside is a
recomputation by gradient checkpointing (or a direct call of a submodule): it opens no pass, and only looks up the one
that it belongs to.

The context knows none of those who use it. Each keeps what it has of a pass in [`ForwardPass.state`], under a key of
its own, and may hang a hook on the outputs of the passes.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .sequence_state import of_continued_cache


T = TypeVar("T")
OutputHook = Callable[["ForwardContext", "ForwardPass", Any], Any]

_INPUT_NAMES = (
    "attention_mask",
    "decoder_attention_mask",
    "input_ids",
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "position_ids",
)


class ForwardPass:
    """One call of the base model: its inputs that matter here, and what each owner keeps of it.

    Holds no tensor with a graph, so that the graph may hold it.

    Args:
        inputs (`dict[str, Any]`): arguments of the call, by name; `batch_shape`, examples and tokens of the call; and
            what [`of_continued_cache`] says of its key-value cache.
        has_gradient (`bool`): whether gradients were enabled when it began.
    """

    def __init__(self, inputs: dict[str, Any], *, has_gradient: bool) -> None:
        self.inputs = inputs
        self.has_gradient = has_gradient
        self.surrounding: ForwardPass | None = None
        """what [`ForwardContext.surround`] said when it began"""
        self.is_open = True
        self.is_awaited = False
        """whether backward will ask for what this pass holds"""
        self.state: dict[Any, Any] = {}
        """what each owner keeps of this pass, under a key of its own"""

    def state_of(self, kind: type[T]) -> T:
        """The state of this class, whose owner is the module that declares it; made when it is first asked for."""
        if kind not in self.state:
            self.state[kind] = kind()
        found: T = self.state[kind]
        return found

    def keep_for_backward(self) -> None:
        """Say that backward will ask for this pass, if it is still running and has gradients."""
        if self.is_open and self.has_gradient:
            self.is_awaited = True


class ForwardContext:
    """Begins, ends and finds the forward passes of one base model, for all adapters in it.

    It is attached by [`install_context`] and found again by [`get_context`].
    """

    def __init__(self) -> None:
        self.output_hooks: list[OutputHook] = []
        """called with the context, each completed pass in which somebody kept something, and the model's output; each
        may return another output"""
        self.extra_inputs: set[str] = set()
        """arguments of the base model that its forward never sees: they are only put into the inputs of the pass"""
        self._start_process()

    def _start_process(self) -> None:
        self.current: ForwardPass | None = None
        self.latest: ForwardPass | None = None
        """the last completed pass that backward will ask for"""
        self.in_backward: ForwardPass | None = None
        self.surrounding: ForwardPass | None = None
        self.graph_state: dict[Any, Any] = {}
        """tensors of the latest pass with their graph, under a key of their owner; dropped when backward or the next
        pass begins, and not kept in the pass, which the graph itself holds"""
        self._opened_at = 0
        self._thread: int | None = None
        self._num_nested = 0

    def __getstate__(self) -> dict[str, Any]:
        """Passes belong to a running process: copies and pickles of a model start without any."""
        return {"output_hooks": self.output_hooks, "extra_inputs": self.extra_inputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()

    def find_hook(self, kind: type[T]) -> T | None:
        """The output hook of this class, or `None`."""
        return next((hook for hook in self.output_hooks if isinstance(hook, kind)), None)

    def begin(self, inputs: dict[str, Any], *, depth: int = 0) -> None:
        """Open a pass. A call within it (the backbone of a language model) belongs to it and opens none.

        Args:
            inputs (`dict[str, Any]`): see [`ForwardPass`].
            depth (`int`): how deep the called module lies: 0 is the base model, 1 its backbone.

        Raises:
            RuntimeError: another thread is using the model.
        """
        self._enter_thread()
        if self.current is not None and depth > self._opened_at:
            self._num_nested += 1
            return
        # a pass that is still open here was interrupted (KeyboardInterrupt): torch then calls no hook
        self._num_nested = 0
        if self.surrounding is not None:
            inputs = {**self.surrounding.inputs, **inputs}
        self.current = ForwardPass(inputs, has_gradient=torch.is_grad_enabled())
        self.current.surrounding = self.surrounding
        self._opened_at = depth
        self.in_backward = None
        self.graph_state = {}

    def _enter_thread(self) -> None:
        """Refuse a second thread while the first one is inside the model: they would get each other's pass."""
        if torch.compiler.is_compiling():
            return
        mine = threading.get_ident()
        is_busy = self.current is not None or self.surrounding is not None
        if is_busy and self._thread != mine and any(other.ident == self._thread for other in threading.enumerate()):
            raise RuntimeError(
                "Two threads call a model with peft_moe adapters at the same time, and would mix up their "
                "batches. Let one call end before the next begins, or give each thread a copy of the model."
            )
        self._thread = mine

    @contextmanager
    def surround(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within this block every pass has these inputs unless it brings its own, and so has what runs outside any
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
        """Close the pass, run the hooks, return the model's output (`None`: its forward raised)."""
        if self._num_nested:
            self._num_nested -= 1
            return output
        finished, self.current = self.current, None
        if finished is None:
            return output
        finished.is_open = False
        if output is None:
            self.graph_state = {}
            return output
        if not (finished.state or finished.is_awaited):
            return output
        if finished.is_awaited:
            self.latest = finished
            self._announce_backward(finished, output)
        for hook in self.output_hooks:
            output = hook(self, finished, output)
        return output

    def _announce_backward(self, finished: ForwardPass, output: Any) -> None:
        """Let a recomputation find the pass that it belongs to, if several passes wait for their backward."""
        if not torch.compiler.is_compiling():
            for _, tensor in differentiable_outputs(output):
                tensor.register_hook(_BackwardBegins(self, finished))  # type: ignore[no-untyped-call]

    def find_pass(self) -> ForwardPass | None:
        """The pass that the running code belongs to: the open one, in a recomputation the one whose backward runs (or
        the latest, if its backward did not come through the model's outputs), else what [`surround`] says, else none.
        """
        if self.current is not None:
            return self.current
        is_in_backward = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
        return (self.in_backward or self.latest) if is_in_backward else self.surrounding


class _BackwardBegins:
    """Tensor hook on an output of the base model. Refers to the context weakly: the graph must not keep alive what
    keeps the graph alive."""

    def __init__(self, context: ForwardContext, forward_pass: ForwardPass) -> None:
        self.context = weakref.ref(context)
        self.forward_pass = forward_pass

    def __call__(self, gradient: torch.Tensor) -> None:
        context = self.context()
        if context is not None:
            context.in_backward = self.forward_pass
            context.graph_state = {}


class _BeginPass:
    """Forward pre-hook of the base model; an object, so that it survives deepcopy and pickle."""

    def __init__(self, context: ForwardContext, positions: dict[str, int], depth: int) -> None:
        self.context = context
        self.positions = positions
        self.depth = depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def given(name: str) -> Any:
            position = self.positions.get(name)
            value = kwargs.get(name)
            return args[position] if value is None and position is not None and position < len(args) else value

        inputs = {name: value for name in _INPUT_NAMES if (value := given(name)) is not None}
        if not self.context.extra_inputs:
            self.context.begin(inputs, depth=self.depth)
            return None
        for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
            if isinstance(tokens := given(name), torch.Tensor) and tokens.dim() > 1:
                inputs["batch_shape"] = tokens.shape[:2]
                break
        extra = {name: kwargs[name] for name in self.context.extra_inputs if name in kwargs}
        if not extra and self.context.surrounding is None:
            inputs |= of_continued_cache(given("past_key_values"))
        self.context.begin({**inputs, **{n: v for n, v in extra.items() if v is not None}}, depth=self.depth)
        if not extra:
            return None
        return args, {name: value for name, value in kwargs.items() if name not in extra}


class _EndPass:
    """Forward hook of the base model, also called when its forward raised."""

    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.context.end(output)


def get_context(model: nn.Module) -> ForwardContext | None:
    """The context of a model or of the base model inside it (a `PeftModel`, a DDP wrapper), or `None`."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _BeginPass):
                return hook.context
    return None


def install_context(base_model: nn.Module) -> ForwardContext:
    """Return the context of `base_model`, attaching a new one by forward hooks if there is none."""
    for hook in base_model._forward_pre_hooks.values():
        if isinstance(hook, _BeginPass):
            return hook.context
    context = ForwardContext()
    for depth, module in enumerate(_entrances(base_model)):
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        positions = {name: position for position, name in enumerate(parameters)}
        module.register_forward_pre_hook(_BeginPass(context, positions, depth), with_kwargs=True)
        module.register_forward_hook(_EndPass(context), always_call=True)
    return context


def _entrances(base_model: nn.Module) -> list[nn.Module]:
    """The model itself and its backbone, which value heads and chunked losses call directly."""
    backbone = getattr(base_model, "base_model", None)
    if isinstance(backbone, nn.Module) and backbone is not base_model:
        return [base_model, backbone]
    return [base_model]


def remove_context(base_model: nn.Module) -> None:
    """Detach the context from `base_model`, with all that stands on it."""
    for module in _entrances(base_model):
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for handle, hook in list(hooks.items()):
                if isinstance(hook, _BeginPass | _EndPass):
                    del hooks[handle]
                    flags.pop(handle, None)


def differentiable_outputs(output: Any) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a model's output that a loss can be built from.

    The output is a `ModelOutput` or dict, a tuple whose first entry, if a scalar, is the loss, or a tensor. A leaf
    that is handed through, such as a soft prompt, is no output of the model.
    """
    if isinstance(output, dict):
        fields = list(output.items())
    elif isinstance(output, torch.Tensor):
        fields = [("", output)]
    elif isinstance(output, tuple):
        fields = [(str(position), value) for position, value in enumerate(output)]
    else:
        fields = list(vars(output).items()) if hasattr(output, "__dict__") else []
    found = [
        (name, leaf)
        for name, value in fields
        if name != "past_key_values"
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf
    ]
    if found and found[0][0] in ("", "0") and found[0][1].dim() == 0:
        found[0] = ("loss", found[0][1])
    return found
