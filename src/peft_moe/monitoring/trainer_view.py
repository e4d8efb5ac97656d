"""What a callback needs to know about its `Trainer` and is not told by any event."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..foreign_moe import RouterRecording
from ..forward_context import ForwardPass
from ..routing_recorder import RoutingRecorder


def calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that has just called `callback`. It is not among the arguments of any event, but on the call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(entry is callback for entry in handler.callbacks):
            return handler
        frame = frame.f_back
    return None


def come_first(callback: TrainerCallback, handler: CallbackHandler) -> None:
    """Put `callback` before the reporters, which see only what is in the logs when they are called.

    Allowed while `handler` goes through its callbacks: the ones after `callback` keep their places.
    """
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def is_evaluating(handler: CallbackHandler | None) -> bool:
    """Whether the evaluation loop runs: generating a sample in between is not part of any data set."""
    loader = None if handler is None else handler.eval_dataloader
    gradient_state = getattr(loader, "gradient_state", None)
    # a data loader that accelerate has not prepared does not say whether it is being read
    return loader is not None and (gradient_state is None or gradient_state.active_dataloader is loader)


def evaluated_prefix(metrics: dict[str, Any]) -> str | None:
    """The `metric_key_prefix` of an evaluation, by the speed that the trainer adds to its metrics; else `None`.

    The final log of training has a speed too, and `total_flos`, which no evaluation has.
    """
    if "total_flos" in metrics:
        return None
    ending = "_steps_per_second"
    return next((key.removesuffix(ending) for key in metrics if key.endswith(ending)), None)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    """Where the trainer puts the checkpoint of this step."""
    return os.path.join(args.output_dir or ".", f"checkpoint-{state.global_step}")


def listen_weakly(
    method: Callable[[ForwardPass], None],
    owner: object,
    recorder: RoutingRecorder,
    recording: RouterRecording | None = None,
) -> weakref.finalize[Any, Any]:
    """Let a method of `owner` listen until `owner` is gone, or until the result is called; then close `recording`.

    The recorder lives in the model, which must not keep a trainer alive.
    """
    listening = weakref.WeakMethod(method)

    def listen(forward_pass: ForwardPass) -> None:
        found = listening()
        if found is not None:
            found(forward_pass)

    def stop() -> None:
        recorder.listeners.remove(listen)
        if recording is not None:
            recording.close()

    recorder.listeners.append(listen)
    return weakref.finalize(owner, stop)
