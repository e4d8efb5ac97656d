"""Run by torchrun: two optimizer steps of the plain Trainer with MoCLE; every rank writes what it saw to a file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from launching import write_report
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_moe import MoCLEConfig
from tiny_models import tiny_llama, token_batch


def main(folder: str, checkpointing: str, find_unused: str, scope: str, accumulation: str) -> None:
    torch.manual_seed(7)
    config = MoCLEConfig(
        num_clusters=6,
        num_experts=3,
        r=2,
        lora_dropout=0.0,
        gate_noise_std=0.0,
        init_lora_weights=False,
        cluster_embedding_dim=5,
        cluster_embedding_scope=scope,
        temperature=0.3,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(), config)
    checkpoint = {}
    if checkpointing != "none":
        reentrant = checkpointing == "reentrant"
        checkpoint = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=int(accumulation),
        max_steps=2,
        max_grad_norm=0,
        learning_rate=1e-2,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters={"default": None, "yes": True, "no": False}[find_unused],
        **checkpoint,
    )
    batch = token_batch(8, num_padding=3)
    # one expert of most layers is never chosen by the examples of one rank
    rows = [{**{name: value[i] for name, value in batch.items()}, "cluster_ids": (0, 3)[i % 2]} for i in range(8)]
    error = None
    try:
        Trainer(model, args, train_dataset=rows).train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    write_report(folder, {"weights": weights, "error": error})
    if error is None and dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
