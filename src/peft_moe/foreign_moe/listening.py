"""Lets the recorder see what the routers decide that a base model brings with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..forward_context import ForwardPass, remove_context
from ..routing import RouterOutput
from ..routing_recorder import RoutingRecorder, get_recorder, install_recorder
from .blocks import ROUTER_NAMES, MoeBlock, read_block, walk_blocks
from .probe import probe
from .routers import read_decision


BASE = "base"
"""what the routers of a base model are recorded as, where those of a tuner have the name of their adapter"""


class RouterRecording:
    """While it is open, the passes of a model's recorder contain the decisions of the base model's own routers.

    Several may be open at once; the last one to be closed leaves the model as the first one found it. Routers are
    recorded while somebody listens to the recorder, and at no other time.

    Args:
        model (`nn.Module`): a model, a `PeftModel` or a distributed wrapper around one.

    Attributes:
        recorder (`RoutingRecorder`): the one of the tuners, or a new one.

    Raises:
        ValueError: the model has no router that is known.
    """

    def __init__(self, model: nn.Module) -> None:
        root = extract_model_from_parallel(model, keep_torch_compile=False)
        self._root: nn.Module = root.get_base_model() if isinstance(root, PeftModel) else root
        known = get_recorder(self._root)
        found, refused = _find_routers(self._root)
        if known is None and not found:
            raise ValueError(_no_router(model, refused))
        self.recorder = install_recorder(self._root) if known is None else known
        self._hooks = [self._hook(router, block) for router, block in found]
        for hook in self._hooks:
            hook.num_users += 1

    def _hook(self, router: nn.Module, block: MoeBlock) -> _RecordDecision:
        for known in router._forward_hooks.values():
            if isinstance(known, _RecordDecision):
                return known
        return _RecordDecision(router, block, self.recorder)

    def close(self) -> None:
        """Stop recording. Nothing happens if it is closed already."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.num_users -= 1
            if not hook.num_users:
                hook.handle.remove()
        is_used = self.recorder.listeners or any(hook.num_users for hook in hooks)
        if hooks and not is_used and not belongs_to_tuner(self._root, self.recorder):
            remove_context(self._root)


def _find_routers(root: nn.Module) -> tuple[list[tuple[nn.Module, MoeBlock]], list[str]]:
    """Every router of the base model with its block, under the name that it had before PEFT wrapped it, and a sentence
    for each mixture whose router is not known. A block that PEFT has copied comes once for each copy."""
    found, refused = [], []
    for name, children, own in walk_blocks(root):
        block = read_block(_original_name(name), {child: _original(entry) for child, entry in children.items()}, own)
        if isinstance(block, str):
            refused.append(block)
        else:
            router_name = next(router for router in ROUTER_NAMES if router in children)
            found.append((_called(children[router_name]), block))
    return found, refused


def _called(router: nn.Module) -> nn.Module:
    """What returns the decision of the base model's router: of a copy in `modules_to_save`, where one is active."""
    if isinstance(router, ModulesToSaveWrapper):
        return router
    inner = getattr(router, "base_layer", None)
    return _called(inner) if isinstance(inner, nn.Module) else router


def _original(module: nn.Module) -> nn.Module:
    """The module of the base model inside what PEFT has put around it."""
    name = "original_module" if isinstance(module, ModulesToSaveWrapper) else "base_layer"
    inner = getattr(module, name, None)
    return _original(inner) if isinstance(inner, nn.Module) else module


def _original_name(name: str) -> str:
    """`name` without the parts that PEFT has put in.

    >>> _original_name("layers.0.mlp.modules_to_save.default.gate")
    'layers.0.mlp.gate'
    """
    parts, kept = iter(name.split(".")), []
    for part in parts:
        if part == "modules_to_save":
            next(parts, None)
        elif part not in ("base_layer", "original_module"):
            kept.append(part)
    return ".".join(kept)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class _Nothing:
    """What is left of a hook in a copy of the model."""

    def __call__(self, *args: Any) -> None:
        pass


class _RecordDecision:
    """Forward hook of a router of the base model."""

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        """A copy of the model is not being recorded."""
        return _Nothing, ()

    def __init__(self, router: nn.Module, block: MoeBlock, recorder: RoutingRecorder) -> None:
        self.block = block
        self.recorder = recorder
        self.is_probability = probe(_original(router), block).is_probability
        self.num_users = 0
        self.handle = router.register_forward_hook(self)

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.recorder.needs_record(is_training=False):
            return
        decision = read_decision(output, self.block.num_experts, is_probability=self.is_probability)
        if isinstance(decision, str):
            return  # it runs with further experts, and the tuner that added them records it
        logits = decision.router_logits.detach().float().reshape(-1, self.block.num_experts)
        index = decision.top_k_index.reshape(logits.shape[0], -1)
        # best first, which some families do not promise
        index = index.gather(-1, logits.gather(-1, index).argsort(dim=-1, descending=True, stable=True))
        self.recorder.record(
            BASE,
            self.block.name,
            RouterOutput(logits, index, None),
            shape=self._shape(logits.shape[0]),
            is_training=False,
        )

    def _shape(self, num_tokens: int) -> torch.Size:
        """That of the call, where its tokens are those of the router: blocks hand on `(T, D)`."""
        forward_pass = self.recorder.context.current
        input_ids = None if forward_pass is None else forward_pass.inputs.get("input_ids")
        if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and input_ids.numel() == num_tokens:
            return input_ids.shape
        return torch.Size([num_tokens])


@contextmanager
def listen_to_routers(model: nn.Module, listener: Callable[[ForwardPass], None]) -> Iterator[None]:
    """Within this context `listener` is called with every forward pass, in training, evaluation or generation.

    Passes hold what the routers of tuners decided, under the name of their adapter, and what those of the base model
    did, under [`BASE`]. Leaves nothing behind. A compiled model runs uncompiled meanwhile.

    Args:
        model (`nn.Module`): a model, a `PeftModel` or a distributed wrapper around one.
        listener: called with each finished [`~peft_moe.forward_context.ForwardPass`].

    Raises:
        ValueError: the model has no router that is known.
    """
    recording = RouterRecording(model)
    listeners = recording.recorder.listeners
    listeners.append(listener)
    try:
        # compiled code does not notice hooks that come after it
        with torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext():
            yield
    finally:
        listeners.remove(listener)
        recording.close()


def belongs_to_tuner(root: nn.Module, recorder: RoutingRecorder) -> bool:
    """Whether a tuner records too, so that the recorder has to stay when nobody listens."""
    return any(hook is not recorder for hook in recorder.context.output_hooks) or any(
        getattr(module, "recorder", None) is recorder for module in root.modules()
    )


def _no_router(model: nn.Module, refused: list[str]) -> str:
    reasons = "".join(f"\n  - {reason}" for reason in refused)
    return (
        f"{type(model).__name__} has no router that peft_moe knows, so there is no expert load"
        + (f":{reasons}\n" if reasons else ". ")
        + "Wrap it first, for example by `get_peft_model(model, MoLEConfig(...))`."
    )
