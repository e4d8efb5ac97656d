"""Run by torchrun: adapters on a base model that transformers shares out while it loads; each rank writes a report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from launching import write_report
from parallel_cases import mole
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from models.tiny_llava import image_batch, labels_of
from peft_moe import MoCLEConfig, MoeLlavaForConditionalGeneration, MoExtendConfig, MoLEConfig
from tiny_models import token_batch


EXPERT_PARALLEL = {"fsdp_size": 2, "ep_size": 2}
ATTENTION_PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
}


def train(model: nn.Module, batch: dict, num_steps: int = 2) -> dict:
    """The same batch on every rank, so that averages change nothing."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(num_steps):
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in trained.items()
    }
    return {"losses": losses, "weights": weights}


def picture_batch() -> dict:
    batch = image_batch(num_padding=2)
    return {**batch, "labels": labels_of(batch), "use_cache": False}


def expert_parallel_moe_llava(folder: Path) -> dict:
    """Full training with a part of the experts on each rank."""
    layout = DistributedConfig(**EXPERT_PARALLEL)
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder / "moe_llava", distributed_config=layout)
    experts = model.model.language_model.layers[0].mlp.experts
    local = {name: list(p.to_local().shape) for name, p in experts.named_parameters()}
    return {**train(model, picture_batch()), "local": local}


def tensor_parallel_mole(folder: Path) -> dict:
    """Experts in MLPs that are whole, beside attention that is split."""
    config = AutoConfig.from_pretrained(folder / "llama")
    config.base_model_tp_plan = ATTENTION_PLAN
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", config=config, tp_plan="auto")
    split = [name for name, p in base.named_parameters() if isinstance(p, DTensor)]
    return {**train(mole(base=base, lora_target_modules=None), token_batch()), "num_split": len(split)}


def refusal(function, *args, **kwargs) -> str | None:
    """What it says."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def main(folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    load = AutoModelForCausalLM.from_pretrained
    found = {
        "ep-moe_llava": expert_parallel_moe_llava(path),
        "tp-mole": tensor_parallel_mole(path),
    }
    for name, config in (("mole", MoLEConfig()), ("mocle", MoCLEConfig())):
        found[f"tp-{name}-split"] = refusal(get_peft_model, load(path / "llama", tp_plan="auto"), config)
    for name, layout in (("ep", EXPERT_PARALLEL), ("fsdp", {"fsdp_size": 2})):
        base = load(path / "mixtral", distributed_config=DistributedConfig(**layout))
        found[f"{name}-moextend"] = refusal(get_peft_model, base, MoExtendConfig(copy_sources={0: 1, 1: 1, 2: 1}))
    write_report(folder, found)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
