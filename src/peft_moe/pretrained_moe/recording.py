"""Lets the recorder see what the routers decide that a base model brings with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from ..recording import ForwardPass, RoutingRecorder, get_recorder, install_recorder, remove_recorder
from ..routing import RouterOutput
from .blocks import MoeBlock, base_of, find_moe_blocks
from .routers import read_routing, returns_probabilities


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
        root = extract_model_from_parallel(model)
        self._root: nn.Module = root.get_base_model() if isinstance(root, PeftModel) else root
        known = get_recorder(self._root)
        blocks, refused = find_moe_blocks(self._root)
        if known is None and not blocks:
            raise ValueError(_no_router(model, refused))
        self.recorder = install_recorder(self._root) if known is None else known
        self._hooks = [self._hook(block) for block in blocks.values()]
        for hook in self._hooks:
            hook.num_users += 1

    def _hook(self, block: MoeBlock) -> _RecordDecision:
        router = base_of(self._root.get_submodule(block.router))
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
        if hooks and not is_used and not _belongs_to_tuner(self._root, self.recorder):
            remove_recorder(self._root)


class _RecordDecision:
    """Forward hook of a router of the base model."""

    def __init__(self, router: nn.Module, block: MoeBlock, recorder: RoutingRecorder) -> None:
        self.block = block
        self.recorder = recorder
        self.is_probability = returns_probabilities(router, block)
        self.num_users = 0
        self.handle = router.register_forward_hook(self)

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.recorder.needs_record(is_training=False):
            return
        routing = read_routing(output, self.block.num_experts, is_probability=self.is_probability)
        if isinstance(routing, str):
            return  # it runs with further experts, and the tuner that added them records it
        logits = routing.router_logits.detach().float().reshape(-1, self.block.num_experts)
        index = routing.top_k_index.reshape(logits.shape[0], -1)
        weights = routing.top_k_weights.detach().reshape(index.shape)
        self.recorder.record(
            BASE,
            self.block.name,
            RouterOutput(logits, index, weights),
            shape=self._shape(logits.shape[0]),
            is_training=False,
        )

    def _shape(self, num_tokens: int) -> torch.Size:
        """That of the call, where its tokens are those of the router: blocks hand on `(T, D)`."""
        forward_pass = self.recorder.current
        input_ids = None if forward_pass is None else forward_pass.inputs.get("input_ids")
        if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and input_ids.numel() == num_tokens:
            return input_ids.shape
        return torch.Size([num_tokens])


@contextmanager
def listen_to_routers(model: nn.Module, listener: Callable[[ForwardPass], None]) -> Iterator[None]:
    """Within this context `listener` is called with every forward pass, in training, evaluation or generation.

    Passes hold what the routers of tuners decided, under the name of their adapter, and what those of the base model
    did, under [`BASE`]. Leaves nothing behind.

    Args:
        model (`nn.Module`): a model, a `PeftModel` or a distributed wrapper around one.
        listener: called with each finished [`~peft_moe.recording.ForwardPass`].

    Raises:
        ValueError: the model has no router that is known.
    """
    recording = RouterRecording(model)
    listeners = recording.recorder.listeners
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
        recording.close()


def _belongs_to_tuner(root: nn.Module, recorder: RoutingRecorder) -> bool:
    return bool(recorder.output_hooks) or any(
        getattr(module, "recorder", None) is recorder for module in root.modules()
    )


def _no_router(model: nn.Module, refused: list[str]) -> str:
    reasons = "".join(f"\n  - {reason}" for reason in refused)
    return (
        f"{type(model).__name__} has no router that peft_moe knows, so there is no expert load"
        + (f":{reasons}\n" if reasons else ". ")
        + "Wrap it first, for example by `get_peft_model(model, MoLEConfig(...))`."
    )
