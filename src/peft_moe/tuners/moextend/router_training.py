"""The `Trainer` that tunes routers for the Extender, and its arguments."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


WARMUP_SHARE = 0.03
SHARDED = (
    "The Extender cannot measure a model that deepspeed or fsdp shards, since its routers could not be put back. Launch with "
    "torchrun alone, and leave both out of args."
)


NOISE = 1e-7
"""a router's gradient whose norm is below is what rounding leaves of 0; Adam would make a full step of it"""


class RouterTrainer(Trainer):
    """Stops at a loss that is not finite, which the logs of a plain `Trainer` filter out, and trains no router on rounding.

    Raises:
        ValueError: the launcher shards the model.
        FloatingPointError: the loss of a step is not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(SHARDED)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}. Make sure that every batch has labels that "
                f"are not -100, or lower the learning rate ({self.args.learning_rate})."
            )
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(parameter.grad.norm() >= NOISE)
        return loss


def training_arguments(
    args: TrainingArguments | None, folder: str, steps: int, learning_rate: float, batch_size: int
) -> TrainingArguments:
    """A copy of `args` that trains for so many steps and saves nothing; without `args` those of the paper's code.

    Raises:
        ValueError: `args` shards the model.
    """
    if args is None:
        args = TrainingArguments(
            folder,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP_SHARE * steps),
            logging_steps=max(1, steps // 20),
            report_to="none",
        )
    if args.deepspeed or args.fsdp:
        raise ValueError(SHARDED)
    args = copy.copy(args)
    args.max_steps, args.learning_rate = steps, learning_rate
    args.per_device_train_batch_size = args.per_device_eval_batch_size = batch_size
    args.save_strategy = args.eval_strategy = "no"
    args.do_eval = args.eval_on_start = False
    args.load_best_model_at_end = args.push_to_hub = args.dataloader_drop_last = False
    return args
