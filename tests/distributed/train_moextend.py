"""Run by torchrun: two optimizer steps of the plain Trainer with MoExtend; every rank writes what it saw to a file."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from launching import write_report
from peft import get_peft_model
from transformers import TrainingArguments

from aux_by_hand import GradientTrap
from peft_moe import MoExtendConfig
from peft_moe.tuners.moextend.router import MoExtendRouter
from tiny_moe import BY_NAME, NUM_EXPERTS


def extended(coef: float) -> torch.nn.Module:
    """A tiny Mixtral with two new experts in layer 0 and one in layer 2."""
    config = MoExtendConfig(
        num_new_experts={0: 2, 2: 1},
        copy_sources={0: 1, 2: 3},
        router_aux_loss_coef=coef,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def rows() -> list[dict[str, torch.Tensor]]:
    """Eight of them; those of one rank are of few words, so that some new expert gets no token of them."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(8):
        words = (3, 5) if number % 2 else (3, 64)
        input_ids = torch.randint(*words, (12,), generator=generator)
        mask = (torch.arange(12) < 12 - number).long()
        found.append(
            {
                "input_ids": input_ids * mask,
                "attention_mask": mask,
                "labels": input_ids.masked_fill(mask == 0, -100),
            }
        )
    return found


def main(folder: str, coef: str, checkpointing: str, find_unused: str, accumulation: str) -> None:
    model = extended(float(coef))
    chosen: dict[str, torch.Tensor] = {}
    for router in (module for module in model.modules() if isinstance(module, MoExtendRouter)):

        def count(module, args, output, name=router.block.name):
            new = output[2].flatten() - NUM_EXPERTS
            chosen[name] = chosen.get(name, 0) + new[new >= 0].bincount(minlength=module.num_new["default"])

        router.register_forward_hook(count)
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
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = GradientTrap(model, args, train_dataset=rows())
    error = None
    try:
        trainer.train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    report = {
        "error": error,
        "gradient": trainer.trapped,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]),
        "chosen": {name: counts.tolist() for name, counts in chosen.items()},
        "is_base_untouched": all(torch.equal(model.get_parameter(name), p) for name, p in base.items()),
    }
    write_report(folder, report)
    if error is None and dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
