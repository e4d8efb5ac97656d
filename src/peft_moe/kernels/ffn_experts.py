"""FFN experts for transformers' experts interface, under the name `"peft_moe"`; registers `"peft_moe_triton"` too.

On a CPU, expert after expert: its tokens are gathered, go through both linears and are added to the output, in chunks
whose temporaries stay small. Only the output of the first linear is kept for backward; the gradient of a weight is
written where it belongs, once. Elsewhere, and where an expert has more parts than two linears, transformers'
`grouped_mm` computes it, or `batched_mm` where sizes are too odd for that; [`explain_ffn_experts`] says which, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from . import ffn_triton
from .ffn_layout import (
    Activation,
    Linears,
    activation_of,
    has_sentinel,
    linears_of,
    obstacle,
    second_derivative_error,
    stored,
    weight_names,
)
from .plan import DispatchPlan


NAME = "peft_moe"
# measured: 512 rows and fewer cost up to 5 %, 128 up to 40 %; more than 1024 gain nothing
MAX_CHUNK_ROWS = 1024


class Chunk(NamedTuple):
    """Consecutive rows of one expert; chunks of an expert are equally long, to one row."""

    expert: int
    rows: slice
    token: torch.Tensor


def register() -> None:
    """Make both names known to transformers' `experts_implementation`. Calling it again changes nothing."""
    ExpertsInterface.register(NAME, ffn_experts_forward)
    ExpertsInterface.register(ffn_triton.NAME, ffn_triton.ffn_triton_forward)


def explain_ffn_experts(experts: nn.Module, device: torch.device | str = "cpu", *, implementation: str = NAME) -> str:
    """Say what computes a module of experts under a name of this package, and why.

    Args:
        experts (`nn.Module`): a module that takes part in transformers' experts interface.
        device (`torch.device` or `str`): where its inputs are.
        implementation (`str`): `"peft_moe"`, or `"peft_moe_triton"`, which never hands on.

    Raises:
        `ValueError`: if the name is another one.

    Example:

    ```py
    >>> explain_ffn_experts(model.model.layers[0].mlp.experts)
    'peft_moe: expert after expert, on the CPU'
    ```
    """
    if implementation == ffn_triton.NAME:
        return ffn_triton.explanation(experts, torch.device(device))
    if implementation != NAME:
        raise ValueError(
            f"explain_ffn_experts knows {NAME!r} and {ffn_triton.NAME!r}, but got implementation={implementation!r}. "
            "Pass one of the two."
        )
    reason = _reason_to_delegate(experts, torch.device(device))
    return f"{NAME}: expert after expert, on the CPU" if reason is None else f"{_stand_in(experts)}: {reason}"


def ffn_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`(T, D)` → `(T, D)`: for each token the weighted sum of its experts, in the form that transformers calls.

    Args:
        self (`nn.Module`): stacked experts, with the attributes that transformers' `use_experts_implementation` gives.
        hidden_states (`torch.Tensor` of shape `(T, D)`)
        top_k_index (`torch.Tensor` of shape `(T, K)`, int64):
            The experts of each token. E stands for an expert of another process, which contributes nothing here.
        top_k_weights (`torch.Tensor` of shape `(T, K)`)
    """
    if _reason_to_delegate(self, hidden_states.device) is not None:
        stand_in = ALL_EXPERTS_FUNCTIONS[_stand_in(self)]
        return stand_in(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
    linears, dtype = linears_of(self, hidden_states.device)
    activation = activation_of(self)
    hidden_states, in_dtype = hidden_states.to(dtype), hidden_states.dtype
    if hidden_states.shape[0] == 1 and not torch.is_grad_enabled():
        return _one_token(hidden_states, top_k_index[0].tolist(), top_k_weights[0], linears, activation).to(in_dtype)
    # experts of other processes are a further expert, whose rows come last and are left out
    plan = DispatchPlan.from_index(top_k_index.long(), int(self.num_experts) + has_sentinel(self))  # type: ignore[arg-type]
    out: torch.Tensor = _FfnExperts.apply(  # type: ignore[no-untyped-call]
        hidden_states, top_k_weights, *linears, plan, activation, torch.is_grad_enabled()
    )
    return out.to(in_dtype)


def _stand_in(experts: nn.Module) -> str:
    """`grouped_mm` demands that rows be multiples of 16 bytes."""
    weights = [stored(experts, name) for name in weight_names(experts)]
    is_even = all(size * weight.element_size() % 16 == 0 for weight in weights for size in weight.shape[1:])
    return "grouped_mm" if is_even else "batched_mm"


def _reason_to_delegate(experts: nn.Module, device: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return "the compiler cannot follow loops whose length depends on the routing"
    if device.type == "cuda":
        return f"its programs for CUDA were never measured; name {ffn_triton.NAME!r} to use them"
    if device.type != "cpu":
        return f"there is no kernel for {device.type!r}"
    return obstacle(experts)


def _of_expert(linears: Linears, expert: int, dtype: torch.dtype) -> Linears:
    """Both linears of one expert in this dtype; the whole stacks are never cast."""
    return Linears(*(None if part is None else part[expert].to(dtype) for part in linears))  # type: ignore[arg-type]


def _chunks(plan: DispatchPlan, num_experts: int) -> Iterator[Chunk]:
    start = 0
    for expert, load in enumerate(plan.expert_load_on_host[:num_experts]):
        num_chunks = -(-load // MAX_CHUNK_ROWS)
        for index in range(num_chunks):
            rows = slice(start + load * index // num_chunks, start + load * (index + 1) // num_chunks)
            yield Chunk(expert, rows, plan.token_of_row[rows])
        start += load


def _affine(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)


def _one_token(
    x_1D: torch.Tensor, experts: list[int], weights_K: torch.Tensor, linears: Linears, activation: Activation
) -> torch.Tensor:
    """Decoding: with a single token there is nothing to sort or to gather."""
    num_experts = linears.up.shape[0]
    out = torch.zeros_like(x_1D, dtype=_sum_dtype(x_1D.dtype))
    with torch.autocast(x_1D.device.type, enabled=False):
        for expert, weight in zip(experts, weights_K.unbind()):
            if expert < num_experts:
                up, up_bias, down, down_bias = _of_expert(linears, expert, x_1D.dtype)
                part = _affine(activation(_affine(x_1D, up, up_bias)), down, down_bias)
                out.addcmul_(part.to(out.dtype), weight)
    return out.to(x_1D.dtype)


class _FfnExperts(torch.autograd.Function):
    """`Σ_k w_tk (act(x_t U_e + a_e) V_e + b_e)`, e the k-th expert of token t."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        plan: DispatchPlan,
        activation: Activation,
        may_have_backward: bool,
    ) -> torch.Tensor:
        linears = Linears(up, up_bias, down, down_bias)
        # needs_input_grad is true without gradients too, if only a parameter may have one
        is_needed = may_have_backward and any(ctx.needs_input_grad)
        inner_NU = x_TD.new_empty(plan.num_tokens * plan.top_k, up.shape[2]) if is_needed else None
        weight_N = _per_row(weights_TK, plan)
        out_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD.dtype))
        with torch.autocast(x_TD.device.type, enabled=False):
            for expert, rows, token in _chunks(plan, up.shape[0]):
                own = _of_expert(linears, expert, x_TD.dtype)
                inner = _affine(x_TD.index_select(0, token), own.up, own.up_bias)
                if inner_NU is not None:
                    inner_NU[rows] = inner
                part = _affine(activation(inner), own.down, own.down_bias).to(out_TD.dtype)
                out_TD.index_add_(0, token, part.mul_(weight_N[rows].unsqueeze(1)))
        ctx.save_for_backward(x_TD, weights_TK, inner_NU, *linears)
        ctx.plan, ctx.activation = plan, activation
        return out_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_error(NAME)
        x_TD, weights_TK, inner_NU, *linears = ctx.saved_tensors
        with torch.autocast(grad_TD.device.type, enabled=False):
            grads = _backward(grad_TD, x_TD, weights_TK, inner_NU, Linears(*linears), ctx)
        return (*grads, None, None, None)


def _backward(
    grad_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    inner_NU: torch.Tensor,
    linears: Linears,
    ctx: Any,
) -> list[torch.Tensor | None]:
    """`g = dy Vᵀ; dw = g·h + dy·b; dV = hᵀ (w dy); du = act'(u) (w g); dU = xᵀ du; dx = du Uᵀ`, chunk by chunk."""
    plan: DispatchPlan = ctx.plan
    needs_x, needs_weights, *needs_linears = ctx.needs_input_grad[:6]
    weight_N = _per_row(weights_TK, plan).to(_sum_dtype(grad_TD.dtype))
    grad_x = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD.dtype)) if needs_x else None
    grad_weight_N = torch.zeros_like(weight_N) if needs_weights else None
    sums = Linears(*(_PerExpertSum(part) if needed else None for part, needed in zip(linears, needs_linears)))  # type: ignore[arg-type]
    for expert, rows, token in _chunks(plan, linears.up.shape[0]):
        own = _of_expert(linears, expert, x_TD.dtype)
        dy = grad_TD.index_select(0, token)
        with torch.enable_grad():
            inner = inner_NU[rows].requires_grad_()
            hidden = ctx.activation(inner)
        values = hidden.detach()
        grad_hidden = torch.mm(dy, own.down.t())
        if grad_weight_N is not None:
            grad_weight_N[rows] = (grad_hidden * values).sum(-1, dtype=weight_N.dtype)
            if own.down_bias is not None:
                grad_weight_N[rows] += dy @ own.down_bias
        weight = weight_N[rows].unsqueeze(1)
        weighted = (dy * weight).to(dy.dtype) if needs_linears[2] or needs_linears[3] else dy
        _add(sums.down, expert, values, weighted)
        _add(sums.down_bias, expert, None, weighted)
        if not (needs_x or needs_linears[0] or needs_linears[1]):
            continue
        (grad_inner,) = torch.autograd.grad(hidden, inner, grad_hidden.mul_(weight))
        if needs_linears[0]:
            _add(sums.up, expert, x_TD.index_select(0, token), grad_inner)
        _add(sums.up_bias, expert, None, grad_inner)
        if grad_x is not None:
            grad_x.index_add_(0, token, torch.mm(grad_inner, own.up.t()).to(grad_x.dtype))
    grad_weights = None if grad_weight_N is None else grad_weight_N[plan.row_of_pair].to(weights_TK.dtype)
    results = [None if entry is None else entry.result() for entry in sums]  # type: ignore[attr-defined]
    return [None if grad_x is None else grad_x.to(x_TD.dtype), grad_weights, *results]


class _PerExpertSum:
    """The gradient of one stacked tensor in its dtype, filled expert after expert; narrow dtypes are summed in float32."""

    def __init__(self, like: torch.Tensor) -> None:
        self.grad = torch.empty_like(like)  # keeps the strides, so that it is laid out as the weight is
        self.seen = [False] * like.shape[0]
        self.running: torch.Tensor | None = None

    def add(self, expert: int, left: torch.Tensor | None, right: torch.Tensor) -> None:
        """Add `leftᵀ right`, or the sum of the rows of `right`. Chunks of one expert come one after the other."""
        into, is_new = self.grad[expert], not self.seen[expert]
        self.seen[expert] = True
        if left is not None and into.dtype == right.dtype == _sum_dtype(into.dtype):
            torch.mm(left.t(), right, out=into) if is_new else into.addmm_(left.t(), right)
            return
        wide = _sum_dtype(right.dtype)
        part = right.sum(0, dtype=wide) if left is None else torch.mm(left.t(), right).to(wide)
        self.running = part if is_new or self.running is None else self.running.add_(part)
        into.copy_(self.running)

    def result(self) -> torch.Tensor:
        """The gradient; 0 for experts without rows."""
        for into, seen in zip(self.grad.unbind(0), self.seen):
            if not seen:
                into.zero_()
        return self.grad


def _add(into: Any, expert: int, left: torch.Tensor | None, right: torch.Tensor) -> None:
    if into is not None:
        into.add(expert, left, right)


def _per_row(weights_TK: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    return weights_TK.reshape(-1).index_select(0, plan.pair_of_row)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
