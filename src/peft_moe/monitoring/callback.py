"""`ExpertLoadCallback`: shows in the logs of an unchanged `Trainer` whether the experts share the work."""

from __future__ import annotations

import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..aux_loss import AuxLoss
from ..foreign_moe import RouterRecording, belongs_to_tuner
from ..forward_context import ForwardPass
from ..routing_recorder import RoutingRecorder, get_recorder, statistics_of
from .expert_load import ExpertLoad, gather_json
from .summary import DEAD_THRESHOLD, LoadSummary


logger = logging.getLogger(__name__)

TRAIN = "train"
T = TypeVar("T")


class ExpertLoadCallback(TrainerCallback):
    """Counts what every expert gets in training and evaluation, logs a summary, and writes the full table to a file.

    Added to the logs, so that every reporter and `trainer.state.log_history` show them:

    | key | meaning |
    |---|---|
    | `aux_loss` | mean over micro-batches of the weighted auxiliary loss; left out if no adapter has one |
    | `expert_load_entropy` | normalised load entropy, mean over routers: 1 is balanced, 0 a single expert |
    | `expert_load_max_share` | largest share that one expert has of the choices of its router |
    | `dead_experts` | experts below `dead_threshold` of the balanced share, over all routers |

    In training they describe the steps since the last log, as `loss` does; in evaluation and prediction the whole data
    set, with the prefix of the other metrics (`eval_expert_load_entropy`; `eval_chess_dead_experts` with
    `eval_dataset={"chess": ...}`). Counts and the mean are those of all processes.

    The file holds the step, the table of all training steps, and one of the latest evaluation of each data set, whose
    name is the domain. It is written at the end of training and at each evaluation and checkpoint; resuming from a
    checkpoint in `output_dir` goes on counting.

    Passing the callback to `Trainer(callbacks=[...])` is better than `add_callback`, which is too late for an
    evaluation before training. Routers record each forward pass as long as the trainer exists.

    Args:
        file_name (`str`, *optional*): name of the file in `output_dir`; `None` writes none.
        dead_threshold (`float`): an expert is dead below this multiple of the balanced share `1 / E`.
        min_entropy (`float`): warn where `expert_load_entropy` is below this.
        max_dead_fraction (`float`): warn where more than this share of the experts is dead.
        patience (`int`): how many training logs in a row must look collapsed before the one warning.

    Attributes:
        train_load ([`ExpertLoad`]), eval_load ([`ExpertLoad`]): counts of all processes, up to the last log.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[ExpertLoadCallback()])
    >>> trainer.train()
    ```

    Raises:
        ValueError: training begins with a model that has no router that is known.
    """

    def __init__(
        self,
        *,
        file_name: str | None = "expert_load.json",
        dead_threshold: float = DEAD_THRESHOLD,
        min_entropy: float = 0.5,
        max_dead_fraction: float = 0.25,
        patience: int = 3,
    ) -> None:
        self.file_name = file_name
        self.dead_threshold = dead_threshold
        self.min_entropy = min_entropy
        self.max_dead_fraction = max_dead_fraction
        self.patience = patience
        self.train_load = ExpertLoad()
        self.eval_load = ExpertLoad()
        self._recorder: weakref.ref[RoutingRecorder] | None = None
        self._stop_listening: weakref.finalize[Any, Any] | None = None
        self._handler: weakref.ref[CallbackHandler] | None = None
        self._image_token_id: int | None = None
        self._aux_losses: list[torch.Tensor] = []
        self._is_training = False
        self._misses_batches = False
        self._num_collapsed_logs = 0
        self._has_warned = False
        self._train_from_step = 0
        self._begin_window()
        self._eval_window = self._new_load()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to listen, so that an evaluation before training counts too."""
        self._join(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from zero, or go on with the counts of the checkpoint that training resumes from."""
        self._join(kwargs["model"], is_required=True)
        self._begin_window()
        self._num_collapsed_logs, self._has_warned = 0, False
        self._is_training = True
        self._resume(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was counted of an evaluation that never ended is void."""
        self._eval_window = self._new_load()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Join a trainer that got this callback after its construction; its running evaluation cannot be exact."""
        if self._handler is None:
            self._join(kwargs["model"])
            self._misses_batches = True
            logger.warning(
                "ExpertLoadCallback was added after the trainer was built and missed the first batch of this "
                "evaluation, which is therefore not counted. Pass it as Trainer(..., "
                "callbacks=[ExpertLoadCallback()])."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the summary to `logs`, which the reporters get next, and to the entry that the trainer has kept."""
        if logs is None:
            return
        prefix = _evaluated_prefix(logs)
        if prefix is not None:
            added = self._end_evaluation(prefix)
        elif "loss" in logs:
            added = self._end_window(state)
        else:
            return
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file."""
        self._write(args, state)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the summary to the metrics of `trainer.predict`, and write the file."""
        prefix = _evaluated_prefix(metrics or {})
        if metrics is not None and prefix is not None:
            metrics.update(self._end_evaluation(prefix))
        self._write(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, also into the checkpoint."""
        self._write(args, state, folders=(args.output_dir or ".", _checkpoint_folder(args, state)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps after the last log too, and write the file."""
        self.train_load = self.train_load + self._window.all_reduce()
        self._begin_window()
        self._is_training = False
        self._write(args, state)

    def _join(self, model: nn.Module | None, *, is_required: bool = False) -> None:
        """Listen to the routers of `model`, and come first among the callbacks."""
        handler = _calling_handler(self)
        if handler is not None:
            # reporters see only what is in the logs when they are called; callbacks after this one keep their places
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
            self._handler = weakref.ref(handler)
        recorder = _alive(self._recorder)
        if model is None or (recorder is not None and get_recorder(model) is recorder):
            return
        known = get_recorder(model)
        # the base model's own routers count where there is nothing else: beside a tuner they are frozen
        has_tuner = known is not None and belongs_to_tuner(model, known)
        try:
            recording = None if has_tuner else RouterRecording(model)
        except ValueError:
            if is_required:
                raise
            return
        recorder = known if recording is None else recording.recorder
        assert recorder is not None
        if self._stop_listening is not None:
            self._stop_listening()
        self._stop_listening = _listen_weakly(self._count, self, recorder, recording)
        self._recorder = weakref.ref(recorder)
        self._image_token_id = ExpertLoad.for_model(model).image_token_id
        self._begin_window()
        self._eval_window = self._new_load()

    def _begin_window(self) -> None:
        """Forget what the steps since the last log have counted. Only reading it waits for the device."""
        self._window, self._aux_losses = self._new_load(), []

    def _new_load(self) -> ExpertLoad:
        return ExpertLoad(image_token_id=self._image_token_id)

    def _count(self, forward_pass: ForwardPass) -> None:
        """Listener of the recorder. Must not wait for the device."""
        recorder = _alive(self._recorder)
        if forward_pass.has_gradient:
            if self._is_training and recorder is not None:
                self._window.add_pass(forward_pass, domain=TRAIN)
                aux_loss = recorder.context.find_hook(AuxLoss)
                with torch.no_grad():
                    total = None if aux_loss is None else aux_loss.total(forward_pass, statistics_of(forward_pass))
                self._aux_losses += [] if total is None else [total]
        elif _is_evaluating(_alive(self._handler)):
            self._eval_window.add_pass(forward_pass)

    def _end_window(self, state: TrainerState) -> dict[str, float]:
        """What the steps since the last log add to the logs; all processes have to call it."""
        load = self._window.all_reduce()
        totals, numbers = zip(*gather_json((float(sum(self._aux_losses)), len(self._aux_losses))), strict=True)
        self._begin_window()
        self.train_load = self.train_load + load
        added = {"aux_loss": sum(totals) / sum(numbers)} if any(numbers) else {}
        summary = load.summary(dead_threshold=self.dead_threshold)
        if summary is not None:
            added.update(_log_keys(summary))
            self._watch_for_collapse(summary, state)
        return added

    def _end_evaluation(self, prefix: str) -> dict[str, float]:
        """What the evaluation that has ended adds to its metrics."""
        load, misses_batches = self._eval_window.all_reduce(), self._misses_batches
        self._eval_window, self._misses_batches = self._new_load(), False
        summary = load.summary(dead_threshold=self.dead_threshold)
        if summary is None or misses_batches:
            return {}
        domain = prefix.removeprefix("eval_")
        self.eval_load = self.eval_load.without_domain(domain) + load.renamed(domain)
        return {f"{prefix}_{name}": value for name, value in _log_keys(summary).items()}

    def _watch_for_collapse(self, summary: LoadSummary, state: TrainerState) -> None:
        is_collapsed = summary.entropy < self.min_entropy or summary.dead_fraction > self.max_dead_fraction
        self._num_collapsed_logs = self._num_collapsed_logs + 1 if is_collapsed else 0
        if self._num_collapsed_logs < self.patience or self._has_warned or not state.is_world_process_zero:
            return
        self._has_warned = True
        logger.warning(
            f"The experts have collapsed: at step {state.global_step} the load entropy is {summary.entropy:.2f} (1 is "
            f"balanced) and {summary.num_dead_experts} of {summary.num_experts} experts are dead; expert "
            f"{summary.busiest_expert} of '{summary.busiest_router}' gets {summary.max_share:.0%}. It has looked so "
            f"for {self._num_collapsed_logs} logs (limits: min_entropy={self.min_entropy}, "
            f"max_dead_fraction={self.max_dead_fraction}). Raise router_aux_loss_coef, lower the learning rate of the "
            "routers, or use fewer experts. This is said once; the logs go on showing expert_load_entropy and "
            "dead_experts."
        )

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        self.train_load, self._train_from_step = ExpertLoad(), state.global_step
        path = os.path.join(_checkpoint_folder(args, state), self.file_name or "")
        if state.global_step and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                table = json.load(file)
            self.train_load, self._train_from_step = ExpertLoad.from_dict(table["train"]), table["train_from_step"]

    def _write(self, args: TrainingArguments, state: TrainerState, *, folders: tuple[str, ...] | None = None) -> None:
        """Write the file whole or not at all; all processes have to call this."""
        if self.file_name is None:
            return
        train_load = self.train_load + self._window.all_reduce()
        if not state.is_world_process_zero:
            return
        table = {
            "step": state.global_step,
            "train_from_step": self._train_from_step,
            "train": train_load.to_dict(dead_threshold=self.dead_threshold),
            "eval": self.eval_load.to_dict(dead_threshold=self.dead_threshold),
        }
        for folder in folders or (args.output_dir or ".",):
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, self.file_name)
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump(table, file)
            os.replace(f"{path}.tmp", path)


def _log_keys(summary: LoadSummary) -> dict[str, float]:
    return {
        "expert_load_entropy": summary.entropy,
        "expert_load_max_share": summary.max_share,
        "dead_experts": summary.num_dead_experts,
    }


def _alive(reference: weakref.ref[T] | None) -> T | None:
    return None if reference is None else reference()


def _calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that has just called `callback`, found on the call stack.

    No argument of any event leads to it. Trainer calls the reporters of `report_to` before `callbacks=[...]`, so that
    keys added in `on_log` would reach `log_history` but no reporter; and only the handler says, from the first batch
    on, whether the evaluation loop runs.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(entry is callback for entry in handler.callbacks):
            return handler
        frame = frame.f_back
    return None


def _is_evaluating(handler: CallbackHandler | None) -> bool:
    """Whether the evaluation loop runs: generating a sample in between is not part of any data set."""
    loader = None if handler is None else handler.eval_dataloader
    gradient_state = getattr(loader, "gradient_state", None)
    # a data loader that accelerate has not prepared does not say whether it is being read
    return loader is not None and (gradient_state is None or gradient_state.active_dataloader is loader)


def _evaluated_prefix(metrics: dict[str, Any]) -> str | None:
    """The `metric_key_prefix` of an evaluation, by the speed that the trainer adds to its metrics; else `None`.

    The final log of training has a speed too, and `total_flos`, which no evaluation has.
    """
    if "total_flos" in metrics:
        return None
    ending = "_steps_per_second"
    return next((key.removesuffix(ending) for key in metrics if key.endswith(ending)), None)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(args.output_dir or ".", f"checkpoint-{state.global_step}")


def _listen_weakly(
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
