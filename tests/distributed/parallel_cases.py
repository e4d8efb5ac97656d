"""What is trained across processes: tiny models of each method, and batches that differ between ranks.

All ranks but the first have a smaller batch, fewer labels and so few words that some expert gets none of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from models.tiny_llava import image_batch, labels_of, tiny_llava
from peft_moe import MoCLEConfig, MoeLlavaForConditionalGeneration, MoExtendConfig, MoLEConfig
from tiny_models import tiny_llama
from tiny_moe import BY_NAME


COEF = 0.5
FIRST_WORD = 5
NUM_STEPS = 2
NUM_MICRO_BATCHES = 2
Batch = dict[str, Any]


def mole(coef: float = COEF, *, base: nn.Module | None = None, **settings: Any) -> nn.Module:
    """Four experts in each MLP of a Llama."""
    settings = {"num_experts": 4, "top_k": 1, "gate_scale": "straight_through", "lora_dropout": 0.0, **settings}
    base = tiny_llama() if base is None else base
    torch.manual_seed(3)
    config = MoLEConfig(router_aux_loss_coef=coef, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return get_peft_model(base, config)


def mole_on_bf16() -> nn.Module:
    """Experts and routers in float32 on a frozen base of half precision."""
    model = mole()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def mocle(cluster_embedding_scope: str = "model", *, base: nn.Module | None = None) -> nn.Module:
    """Three experts and a universal one for six clusters."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(7)
    config = MoCLEConfig(
        num_clusters=6,
        num_experts=3,
        r=2,
        lora_dropout=0.0,
        gate_noise_std=0.0,
        init_lora_weights=False,
        cluster_embedding_dim=5,
        cluster_embedding_scope=cluster_embedding_scope,
        temperature=0.3,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def moextend(coef: float = COEF, **settings: Any) -> nn.Module:
    """A Mixtral with two new experts in layer 0 and one in layer 2."""
    sources = {"num_new_experts": {0: 2, 2: 1}, "copy_sources": {0: 1, 2: 3}}
    config = MoExtendConfig(router_aux_loss_coef=coef, task_type="CAUSAL_LM", **sources, **settings)
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def moe_llava() -> nn.Module:
    """All of a sparse LLaVA with eight experts trains; its auxiliary loss is part of `outputs.loss`."""
    model = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), num_experts=8, expert_noise=1.0)
    model.config.text_config.router_aux_loss_coef = COEF
    return model


def moe_llava_with_frozen_tower() -> nn.Module:
    """Each parameter that trains gets a gradient, which the last norm of the vision tower does not."""
    model = moe_llava()
    model.model.vision_tower.requires_grad_(False)
    return model


def text_batch(rank: int, number: int, *, is_even: bool = False) -> Batch:
    """Two samples of many words on rank 0; on each other rank a single one of two words that ends in padding."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    size, words = ((2, 12), (3, 64)) if rank == 0 or is_even else ((1, 12), (3, 5))
    input_ids = torch.randint(*words, size, generator=generator)
    mask = torch.ones_like(input_ids)
    mask[-1, 12 - 3 * rank - number % 2 :] = 0
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
    }


def clustered_batch(rank: int, number: int) -> Batch:
    """Examples of one rank are of one cluster."""
    batch = text_batch(rank, number)
    return {**batch, "cluster_ids": torch.full((len(batch["input_ids"]),), (0, 3, 1, 4)[rank])}


def picture_batch(rank: int, number: int) -> Batch:
    """Images and text: two samples of many words on rank 0; on each other rank a single one of two words."""
    padding = rank + number % 2
    batch = image_batch(1 if rank else 2, 9 - padding, num_padding=padding, seed=10 * number + rank)
    if rank:
        input_ids = batch["input_ids"]
        batch["input_ids"] = torch.where(input_ids < FIRST_WORD, input_ids, FIRST_WORD + input_ids % 2)
    return {**batch, "labels": labels_of(batch)}


@dataclass(frozen=True)
class Case:
    """One method.

    Args:
        build: makes the model, always with the same weights.
        batch: of a rank, by its number.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]


CASES = {
    "mole": Case(mole, text_batch),
    "mole-by-sample": Case(lambda: mole(router_aux_loss_type="mole"), text_batch),
    "mole-task-only": Case(lambda: mole(0.0), text_batch),
    "mole-global": Case(lambda: mole(router_aux_loss_scope="global", router_z_loss_coef=0.1), text_batch),
    "mole-pooled-global": Case(
        lambda: mole(router_aux_loss_scope="global", router_aux_loss_type="pooled", top_k=2), text_batch
    ),
    "mole-on-bf16": Case(mole_on_bf16, text_batch),
    "mocle": Case(mocle, clustered_batch),
    "mocle-table-per-layer": Case(lambda: mocle("layer"), clustered_batch),
    "moextend": Case(moextend, text_batch),
    "moextend-task-only": Case(lambda: moextend(0.0), text_batch),
    "moextend-global": Case(lambda: moextend(router_aux_loss_scope="global"), text_batch),
    "moe_llava": Case(moe_llava, picture_batch),
    "moe_llava-frozen-tower": Case(moe_llava_with_frozen_tower, picture_batch),
}


def steps_of(case: Case, num_ranks: int = 2) -> list[list[list[Batch]]]:
    """Batches by step, micro-batch and rank; the loss of each is divided by the labels of the whole step."""
    steps = []
    for step in range(NUM_STEPS):
        numbers = range(step * NUM_MICRO_BATCHES, (step + 1) * NUM_MICRO_BATCHES)
        batches = [[case.batch(rank, number) for rank in range(num_ranks)] for number in numbers]
        labels = sum(batch["labels"][:, 1:].ne(-100).sum() for row in batches for batch in row)
        steps.append([[{**batch, "num_items_in_batch": labels} for batch in row] for row in batches])
    return steps


def joined(batches: list[Batch]) -> Batch:
    """One batch of the examples of all ranks."""
    return {
        name: value if value.dim() == 0 else torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
    }


def checkpoint(model: nn.Module, kind: str) -> None:
    """Turn on gradient checkpointing of a kind: `"none"`, `"non_reentrant"` or `"reentrant"`."""
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()


def train(model: nn.Module, steps: list[list[list[Batch]]], num_processes: int, whole: Callable = lambda t: t) -> dict:
    """Train on all of `steps`, and return the losses, the gradient of the first step and the weights.

    Args:
        model: may be wrapped.
        steps: batches of this process by step and micro-batch.
        num_processes: gradients are averaged over so many.
        whole: makes a whole tensor of a sharded one.
    """
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses, gradient = [], None
    for step in steps:
        for batch in (batch for row in step for batch in row):
            loss = model.train()(**batch).loss
            losses.append(loss.item())
            (loss * num_processes).backward()
        if gradient is None:
            gradient = {
                name: torch.zeros(p.shape) if p.grad is None else whole(p.grad).detach().clone()
                for name, p in trained.items()
            }
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: whole(p).detach().clone() for name, p in trained.items()}
    return {"losses": losses, "gradient": gradient, "weights": weights}


def rows(name: str, count: int = 16) -> list[dict[str, Any]]:
    """Examples for a `Trainer`: every other one has few words, and each another number of labels."""
    found = []
    for number in range(count):
        batch = CASES[name].batch(number % 2, number)
        found.append({key: value[-1] for key, value in batch.items()})
    return found
