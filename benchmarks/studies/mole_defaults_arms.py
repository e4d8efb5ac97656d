"""What `mole_defaults.py` compares, and at what size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_moe import MoLEConfig


NUM_EXPERTS, RANK = 4, 4


@dataclass(frozen=True)
class Sizes:
    """What one measurement costs."""

    vocab: int = 2048
    hidden: int = 64
    intermediate: int = 192
    layers: int = 3
    heads: int = 4
    max_length: int = 88
    pretrain_steps: int = 1500
    pretrain_batch: int = 16
    steps: int = 150
    rows_per_domain_and_step: int = 4
    validation_rows: int = 64
    test_rows: int = 150
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    seeds: int = 5


QUICK = Sizes(vocab=512, hidden=32, intermediate=64, layers=2, pretrain_steps=20, steps=5, validation_rows=8,
              test_rows=8, learning_rates=(1e-2,), seeds=3)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune. `settings` go to `MoLEConfig`; with one expert that is LoRA."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    router_lr_factor: float = 1.0
    is_oracle: bool = False
    is_core: bool = False
    active_rank: int = RANK

    def config(self) -> MoLEConfig:
        """Scaled by alpha / r = 2 in every arm, experts on the three linears of each MLP, attention untouched."""
        chosen: dict[str, Any] = {
            "num_experts": NUM_EXPERTS,
            "r": RANK,
            "router_aux_loss_coef": 0.01,
            "router_aux_loss_type": "switch",
            "kernel_backend": "auto" if self.settings.get("num_experts") == 1 else "dense",
            **self.settings,
        }
        return MoLEConfig(
            **chosen, lora_alpha=2 * chosen["r"], lora_dropout=0.0, lora_target_modules=None, task_type="CAUSAL_LM"
        )


def lora(rank: int, **more: Any) -> Arm:
    """Plain LoRA on the linears that MoLE adapts."""
    return Arm(f"lora r{rank}", {"num_experts": 1, "r": rank}, active_rank=rank, is_core=True, **more)


def mole(name: str, gate: str, *, k: int = 1, factor: float = 1.0, is_core: bool = False, **settings: Any) -> Arm:
    """Four experts of rank 4."""
    return Arm(name, {"gate_scale": gate, "top_k": k, **settings}, factor, is_core=is_core, active_rank=k * RANK)


ST = "straight_through"
ARMS = (
    lora(RANK),
    Arm("oracle: lora r4 per domain", {"num_experts": 1}, is_oracle=True, is_core=True),
    lora(2 * RANK),
    lora(NUM_EXPERTS * RANK),
    mole("top-1 none", "none", is_core=True),
    mole("top-1 st", ST, is_core=True),
    mole("top-1 prob", "prob", is_core=True),
    mole("top-2 st", ST, k=2, is_core=True),
    mole("top-2 prob", "prob", k=2, is_core=True),
    Arm("soft", {"soft": True, "router_aux_loss_coef": 0.0}, is_core=True, active_rank=NUM_EXPERTS * RANK),
    mole("top-1 none, balance 0", "none", router_aux_loss_coef=0.0),
    mole("top-1 st, balance 0", ST, router_aux_loss_coef=0.0),
    mole("top-1 st, balance 0.001", ST, router_aux_loss_coef=0.001),
    mole("top-1 st, balance 0.1", ST, router_aux_loss_coef=0.1),
    mole("top-2 prob, balance 0", "prob", k=2, router_aux_loss_coef=0.0),
    mole("top-2 prob, balance 0.1", "prob", k=2, router_aux_loss_coef=0.1),
    mole("top-1 st, init 0", ST, router_init_std=0.0),
    mole("top-1 st, init 0.02", ST, router_init_std=0.02),
    mole("top-1 st, router lr x10", ST, factor=10.0),
    mole("top-2 prob, router lr x10", "prob", k=2, factor=10.0),
    Arm("soft, router lr x10", {"soft": True, "router_aux_loss_coef": 0.0}, 10.0, active_rank=NUM_EXPERTS * RANK),
    mole("top-1 st, mole-form balance", ST, router_aux_loss_type="mole"),
    mole("top-1 prob, balance 0", "prob", router_aux_loss_coef=0.0),
    mole("top-2 prob, router frozen", "prob", k=2, factor=0.0),
)
