"""Run by torchrun: one optimizer step of the plain Trainer; every rank writes what it saw to a file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from launching import write_report
from transformers import TrainingArguments

from aux_by_hand import GradientTrap, build, rows_of
from tiny_models import token_batch


def main(folder: str, coef: str, checkpointing: str, find_unused: str, accumulation: str) -> None:
    steps = int(accumulation)
    model = build(coef=float(coef), router_aux_loss_type="mole", lora_target_modules=None)
    checkpoint = {}
    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        checkpoint = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=steps,
        max_steps=2,
        max_grad_norm=0,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters={"default": None, "yes": True, "no": False}[find_unused],
        **checkpoint,
    )
    batches = [token_batch(2, 12, num_padding=3 * (i % 2), seed=i) for i in range(2 * steps)]
    trainer = GradientTrap(model, args, train_dataset=rows_of(batches))
    error = None
    try:
        trainer.train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    write_report(folder, {"gradient": trainer.trapped, "weights": weights, "error": error})
    if error is None and dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
