"""Gradients of the auxiliary loss computed by hand: logits of a plain forward pass, put into the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_moe import MoLEConfig
from peft_moe.routing import TopKRouter
from tiny_models import tiny_llama


COEF = 0.5
LOSS_TYPES = ["switch", "pooled", "mole"]


def build(coef: float = COEF, **settings):
    model = tiny_llama()
    defaults = {"num_experts": 4, "top_k": 1, "gate_scale": "straight_through", "lora_dropout": 0.0}
    settings = {**defaults, "init_lora_weights": False, **settings}
    torch.manual_seed(3)
    config = MoLEConfig(router_aux_loss_coef=coef, task_type="CAUSAL_LM", **settings)
    return get_peft_model(model, config).train()


def gradients(model) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trainable(model)]
    ).double()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def balance_by_hand(logits, index, mask, loss_type):
    """Formulas of the papers, for a list of (T, E) logits and (T, 1) choices; mask (B, S)."""
    flat = mask.flatten().bool()
    if loss_type == "switch":
        losses = []
        for layer_logits, layer_index in zip(logits, index, strict=True):
            probability = layer_logits.softmax(-1)[flat].mean(0)
            share = torch.nn.functional.one_hot(layer_index[flat, 0], 4).float().mean(0)
            losses.append(4 * (share * probability).sum())
        return sum(losses) / len(losses)
    samples = [flat] if loss_type == "pooled" else [flat & row_of(mask, b) for b in range(mask.shape[0])]
    losses = []
    for rows in samples:
        probability = torch.cat([entry.softmax(-1)[rows] for entry in logits]).mean(0)
        share = torch.cat([torch.nn.functional.one_hot(entry[rows, 0], 4).float() for entry in index]).mean(0)
        losses.append((share * probability).sum())
    return 4 * losses[0] if loss_type == "pooled" else sum(losses) / len(losses)


def row_of(mask, b):
    rows = torch.zeros_like(mask, dtype=torch.bool)
    rows[b] = True
    return rows.flatten()


def aux_by_hand(model, batch, loss_type="switch"):
    """COEF times the auxiliary loss of one forward pass, with a graph."""
    outputs = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in model.modules()
        if isinstance(module, TopKRouter)
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    logits = [output.router_logits for output in outputs]
    index = [output.top_k_index for output in outputs]
    return COEF * balance_by_hand(logits, index, batch["attention_mask"], loss_type)


def expected_gradient(batches, weights, loss_type="switch", **settings) -> torch.Tensor:
    """Σ weight · gradient of the auxiliary loss, over micro-batches."""
    model = build(coef=0.0, **settings)
    total = sum(w * aux_by_hand(model, batch, loss_type) for w, batch in zip(weights, batches, strict=True))
    found = torch.autograd.grad(total, trainable(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.norm() > 1e-4
    ratio = (found.norm() / expected.norm()).item()
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0).item()
    assert ratio == pytest.approx(1.0, abs=2e-3), f"norm ratio {ratio}"
    assert cosine == pytest.approx(1.0, abs=1e-4), f"cosine {cosine}"


def effect_of_aux_loss(run, **settings) -> torch.Tensor:
    """What the auxiliary loss adds to the gradients that `run(model)` leaves."""
    found = []
    for coef in (COEF, 0.0):
        model = build(coef=coef, **settings)
        run(model)
        found.append(gradients(model))
    return found[0] - found[1]


class GradientTrap(Trainer):
    """Trainer that keeps the gradients of its first optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trapped = None

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        inner, trainer = self.model, self

        def trap(*_):
            if trainer.trapped is None:
                trainer.trapped = gradients(inner)

        optimizer.register_step_pre_hook(trap)
        return optimizer


def rows_of(batches):
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(batch["input_ids"].shape[0])]


def label_share(batches):
    counts = torch.tensor([batch["labels"][:, 1:].ne(-100).sum().item() for batch in batches]).double()
    return (counts / counts.sum()).tolist()


def outside_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch
