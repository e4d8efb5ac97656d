"""FFN experts, what they are given, and what they have to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


@dataclass(frozen=True)
class FfnCase:
    """Experts and what they are given. A shape has a reason; `forced` is the choice of every token."""

    reason: str
    num_tokens: int = 24
    width: int = 24
    inner: int = 16
    num_experts: int = 4
    top_k: int = 2
    activation: str = "silu"
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_own_gate: bool = False
    forced: tuple[tuple[int, ...], ...] | None = None


CASES = {
    "top_1": FfnCase("one expert per token", top_k=1),
    "top_2": FfnCase("two"),
    "top_4": FfnCase("all experts for all tokens", top_k=4),
    "no_tokens": FfnCase("a batch may be empty", num_tokens=0, has_bias=True),
    "one_token": FfnCase("decoding", num_tokens=1),
    "empty_experts": FfnCase("experts without rows", num_experts=9, forced=((7, 2),) * 24),
    "same_expert_twice": FfnCase("both slots count", forced=((1, 1),) * 24),
    "skewed": FfnCase("one expert has nearly all", num_tokens=70, top_k=1, forced=((2,),) * 69 + ((0,),)),
    "odd_sizes": FfnCase("no power of two", num_tokens=19, width=37, inner=45, num_experts=3, has_bias=True),
    "several_tiles": FfnCase("more than a tile each way", 40, 40, 72, num_experts=2, has_bias=True),
    "transposed": FfnCase("the other layout", is_transposed=True, has_bias=True),
    "plain": FfnCase("no gate", has_gate=False, activation="gelu"),
    "plain_transposed": FfnCase("no gate", has_gate=False, has_bias=True, is_transposed=True, activation="relu2"),
    "own_gate": FfnCase("torch computes the activation", has_bias=True, is_transposed=True, has_own_gate=True),
    "other_experts": FfnCase("E stands for an expert elsewhere", has_bias=True, forced=((4, 1), (4, 4), (3, 0)) * 8),
    "other_experts_own_gate": FfnCase(
        "as above", has_bias=True, has_own_gate=True, forced=((4, 1), (4, 4), (3, 0)) * 8
    ),
}


class Settings:
    """What transformers reads of a configuration."""

    _experts_implementation = "peft_moe"


def oracle(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token, slot by slot; an index of E contributes nothing."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    out = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for slot in range(index.shape[1]):
            e = int(index[token, slot])
            if e == experts.num_experts:
                continue
            up, down = getattr(experts, up_name)[e], experts.down_proj[e]
            up, down = (up.T, down.T) if experts.is_transposed else (up, down)
            inner = up @ x[token] + (getattr(experts, f"{up_name}_bias")[e] if experts.has_bias else 0)
            hidden = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            values = down @ hidden + (experts.down_proj_bias[e] if experts.has_bias else 0)
            total = total + weights[token, slot] * values
        out.append(total)
    return torch.stack(out)


class Stacks(nn.Module):
    """Parameters as the interface names them."""

    def __init__(self, config, case: FfnCase):
        super().__init__()
        self.num_experts = case.num_experts
        name, height = ("gate_up_proj", 2 * case.inner) if case.has_gate else ("up_proj", case.inner)
        for name, shape in ((name, (height, case.width)), ("down_proj", (case.width, case.inner))):
            stored = shape[::-1] if case.is_transposed else shape
            setattr(self, name, nn.Parameter(torch.randn(case.num_experts, *stored) / shape[1] ** 0.5))
            if case.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(case.num_experts, shape[0])))
        self.act_fn = ACT2FN[case.activation]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return oracle(self, hidden_states, top_k_index, top_k_weights)


def loop_over_experts(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the oracle computes, for larger shapes."""
    out, name = torch.zeros_like(x), "gate_up_proj" if experts.has_gate else "up_proj"
    for expert in range(experts.num_experts):
        token, slot = torch.where(index == expert)
        rows = x[token]
        for linear in (name, "down_proj"):
            weight = getattr(experts, linear)[expert]
            rows = rows @ (weight if experts.is_transposed else weight.t())
            rows = rows + getattr(experts, f"{linear}_bias")[expert] if experts.has_bias else rows
            if linear == name:
                rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        out = out.index_add(0, token, rows * weights[token, slot, None])
    return out


def own_gate(self, gate_up):
    """Interleaved as that of gpt-oss, but smooth: at the steps of a clamp, rounding would decide about the slope."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    return (torch.tanh(up) + 1) * gate * torch.sigmoid(1.7 * gate)


def make(case: FfnCase, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The experts of a case, always with the same weights."""
    torch.manual_seed(0)
    own = type("Own", (Stacks,), {"_apply_gate": own_gate} if case.has_own_gate else {})
    flags = {"is_transposed": case.is_transposed, "has_bias": case.has_bias, "has_gate": case.has_gate}
    experts = use_experts_implementation(own, **flags)(Settings(), case)
    experts._is_expert_parallel = case.forced is not None
    return experts.to(dtype)


def inputs(case: FfnCase, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Tokens, the choice of experts, and their weights in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.num_tokens, case.width, generator=generator).to(dtype)
    order = torch.rand(case.num_tokens, case.num_experts, generator=generator).argsort(1)
    index = order[:, : case.top_k] if case.forced is None else torch.tensor(case.forced)
    return x, index, torch.rand(case.num_tokens, case.top_k, generator=generator)


def cotangent_of(out: torch.Tensor) -> torch.Tensor:
    """The gradient of the output: multiples of 1/8, which no dtype rounds."""
    numbers = torch.arange(out.numel(), device=out.device) * 37 % 17 - 8
    return (numbers / 8).to(out.dtype).view_as(out)


def with_gradients(function, experts: nn.Module, x, index, weights) -> list[torch.Tensor]:
    """Output, and gradients of the tokens, the weights and the parameters."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(experts, x, index, weights)
    return [out.detach(), *torch.autograd.grad(out, [x, weights, *experts.parameters()], cotangent_of(out))]


def expected(case: FfnCase, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients in float64, of inputs and weights that were rounded to `dtype`."""
    x, index, weights = inputs(case, dtype)
    experts = make(case, dtype).double()
    if not len(x):
        return [x.double(), x.double(), weights.double(), *(torch.zeros_like(p) for p in experts.parameters())]
    return with_gradients(oracle, experts, x.double(), index, weights.double())


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest relative Frobenius error; NaN if there is one."""
    pairs = list(zip(found, wanted, strict=True))
    assert all(f.shape == w.shape for f, w in pairs)
    return float(torch.stack([(f.double() - w).norm() / w.norm().clamp_min(1e-30) for f, w in pairs]).max())
