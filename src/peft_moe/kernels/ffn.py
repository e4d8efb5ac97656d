"""FFN experts for transformers' experts interface, under the names `"peft_moe"` and `"peft_moe_triton"`.

`"peft_moe"` hands on to transformers' `grouped_mm`, or to `batched_mm` where sizes or dtype are not for it: on a CPU
nothing of our own was faster (benchmarks/studies/log.md), and on CUDA nothing was measured. `"peft_moe_triton"` runs
Triton programs and never hands on: tokens are gathered and weighted inside the products, and a usual activation is
computed where its product ends. Of the intermediate tensors only the output of the first linear is kept for backward.
The host waits for nothing, no two programs write to one place, and the stacks of weights are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import ACT2FN
from transformers.integrations import moe

from .backends.triton import as_float, is_usable, unit_stride
from .triton import is_interpreted
from .triton.rows import Order, Wanted, order_of


NAME = "peft_moe"
TRITON_NAME = "peft_moe_triton"
# what transformers calls an activation → what the programs call it
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
CLASSES = {type(ACT2FN[name]): ours for name, ours in ACTIVATIONS.items()}


Activation = Callable[[torch.Tensor], torch.Tensor]


class Linears(NamedTuple):
    """The stacked linears of E experts, `x W_up → activation → W_down`.

    `up` `(E, D, U)` and `down` `(E, F, D)`, seen as matrices that rows are multiplied with from the left; U is 2F
    where there is a gate. Biases `(E, U)` and `(E, D)`, or `None`.
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class Mixture(NamedTuple):
    """Experts in one call: their linears, where the pairs go, and what is between the linears.

    `activation` is a name that the programs know, or a function `(N, U)` → `(N, F)` that torch computes.
    """

    linears: Linears
    order: Order
    activation: str | Activation
    has_gate: bool


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: bool
    up: bool
    up_bias: bool
    down: bool
    down_bias: bool


def register() -> None:
    """Make both names known to transformers' `experts_implementation`. Calling it again changes nothing."""
    moe.ExpertsInterface.register(NAME, ffn_experts_forward)
    moe.ExpertsInterface.register(TRITON_NAME, ffn_triton_forward)


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
    'grouped_mm: dtype and widths are for it'
    ```
    """
    if implementation == NAME:
        return ": ".join(stand_in_for(experts))
    if implementation != TRITON_NAME:
        raise ValueError(
            f"explain_ffn_experts knows {NAME!r} and {TRITON_NAME!r}, but got implementation={implementation!r}. "
            "Pass one of the two."
        )
    reason = reason_against_triton(experts, torch.device(device))
    if reason is not None:
        return f"{TRITON_NAME}: cannot run, {reason}"
    activation = known_activation(experts)
    return f"{TRITON_NAME}: Triton programs, " + (
        "with the activation between them by torch" if activation is None else f"with {activation!r} inside"
    )


def stand_in_for(experts: nn.Module) -> tuple[str, str]:
    """What of transformers computes the experts under the name `"peft_moe"`, and why."""
    weights = [stored(experts, name) for name in weight_names(experts)]
    if any(weight.dtype == torch.float64 for weight in weights):
        return "batched_mm", "grouped_mm does not take float64"
    if any(size * weight.element_size() % 16 for weight in weights for size in weight.shape[1:]):
        return "batched_mm", "grouped_mm demands that rows be multiples of 16 bytes"
    return "grouped_mm", "dtype and widths are for it"


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
    implementation = moe.ALL_EXPERTS_FUNCTIONS[stand_in_for(self)[0]]
    return implementation(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


def obstacle(experts: nn.Module) -> str | None:
    """Why these experts are more than two linears with an activation between them, if they are."""
    if getattr(experts, "has_post_expert_norm", False):
        return "the experts have a norm after their second linear"
    up, down = weight_names(experts)
    named = dict(experts.named_parameters())
    # torch.nn.utils.parametrize (PEFT's `target_parameters`) keeps an attribute's own parameters there
    ours = {up, down, f"{up}_bias", f"{down}_bias", *(name for name in named if name.startswith("parametrizations."))}
    others = sorted(set(named) - ours)
    if others:
        return f"the experts have parameters beside their two linears ({', '.join(others)})"
    for name in (up, down):
        weight = stored(experts, name)
        if isinstance(weight, DTensor) or not weight.is_floating_point():
            return f"{name!r} is {type(weight).__name__} of {weight.dtype}"
    return None


def has_sentinel(experts: nn.Module) -> bool:
    """Whether E may stand for an expert of another process."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def stored(experts: nn.Module, name: str) -> torch.Tensor:
    """What is behind an attribute: to read a parametrized one would compute it."""
    parameter = experts._parameters.get(name)
    if parameter is None and parametrize.is_parametrized(experts, name):
        parameter = experts.get_parameter(f"parametrizations.{name}.original")
    found: torch.Tensor = getattr(experts, name) if parameter is None else parameter
    return found


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """The attributes with the weights of both linears."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def activation_of(experts: nn.Module) -> Activation:
    """What is between the linears: `(N, U)` → `(N, F)`."""
    return experts._apply_gate if experts.has_gate else experts.act_fn  # type: ignore[return-value]


def linears_of(experts: nn.Module, device: torch.device) -> tuple[Linears, torch.dtype]:
    """The linears as they are, and the dtype to compute in."""
    parts: dict[str, torch.Tensor | None] = {}
    for name, weight_name in zip(("up", "down"), weight_names(experts), strict=True):
        weight = getattr(experts, weight_name)
        parts[name] = weight if experts.is_transposed else weight.transpose(1, 2)
        parts[f"{name}_bias"] = getattr(experts, f"{weight_name}_bias") if experts.has_bias else None
    linears = Linears(**parts)  # type: ignore[arg-type]
    return linears, dtype_of(linears.up, linears.down, device)


def dtype_of(up: torch.Tensor, down: torch.Tensor, device: torch.device) -> torch.dtype:
    """The wider dtype of both weights, or that of autocast."""
    dtype = torch.promote_types(up.dtype, down.dtype)
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    return dtype


def reason_against_triton(experts: nn.Module, device: torch.device) -> str | None:
    """Why the programs cannot compute these experts on this device, if they cannot."""
    is_there, reason = is_usable()
    if not is_there:
        return reason
    if device.type != ("cpu" if is_interpreted() else "cuda"):
        where = "the CPU, where Triton's interpreter runs" if is_interpreted() else "CUDA"
        return f"it takes tensors on {where}, but these are on {device.type!r}"
    reason_of_parts = obstacle(experts)
    if reason_of_parts is not None:
        return reason_of_parts
    up, down = (stored(experts, name) for name in weight_names(experts))
    for weight in (up, down):
        if is_traceable_wrapper_subclass(weight):
            return f"a weight is {type(weight).__name__}, which has no memory of its own"
    dtype = dtype_of(up, down, device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"tensor cores take float32, bfloat16 and float16, not {dtype}"
    if torch.compiler.is_compiling() and known_activation(experts) is None:
        return "a compiled graph can hold only activations that the programs know, and these experts have another one"
    return None


def known_activation(experts: nn.Module) -> str | None:
    """The name of the activation, if the programs know it and the gate is `act(first half) · second half`."""
    if experts.has_gate and not has_usual_gate(experts):
        return None
    activation = experts.act_fn
    if not isinstance(activation, nn.Module) or is_altered(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return CLASSES.get(type(activation))


def is_altered(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def has_usual_gate(experts: nn.Module) -> bool:
    """Whether nobody has replaced the gate of transformers, neither in the class nor in the module."""
    usual = getattr(moe, "_default_apply_gate", None)
    return getattr(type(experts), "_apply_gate", None) is usual and "_apply_gate" not in experts.__dict__


def ffn_triton_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`(T, D)` → `(T, D)`: for each token the weighted sum of its experts, in the form that transformers calls.

    Args: as those of [`ffn_experts_forward`].

    Raises:
        `RuntimeError`: if the programs cannot run here, or not with these experts; says why.
    """
    reason = reason_against_triton(self, hidden_states.device)
    if reason is not None:
        raise RuntimeError(
            f"experts_implementation={TRITON_NAME!r} cannot compute {type(self).__name__}: {reason}. Use "
            "model.set_experts_implementation('grouped_mm')."
        )
    linears, dtype = linears_of(self, hidden_states.device)
    order = order_of(top_k_index, int(self.num_experts) + has_sentinel(self))  # type: ignore[arg-type]
    mixture = Mixture(linears, order, known_activation(self) or activation_of(self), bool(self.has_gate))
    # on CUDA, autocast would add up the slots in float32
    with torch.autocast(hidden_states.device.type, enabled=False):
        out = _run(hidden_states.to(dtype), top_k_weights, mixture)
    return out.to(hidden_states.dtype)


def _run(x_TD: torch.Tensor, weights_TK: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    differentiable = (x_TD, weights_TK, *mixture.linears)
    is_needed = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in differentiable)
    if torch.compiler.is_compiling():
        given = (*differentiable, *mixture.order, mixture.activation, mixture.has_gate, is_needed)
        return ffn_op(*given)[0]  # type: ignore[no-any-return]
    if is_needed:
        return _FfnTriton.apply(*differentiable, *mixture[1:])  # type: ignore[no-untyped-call,no-any-return]
    return compute(x_TD, weights_TK, mixture, keeps_inner=False)[0]


def compute(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, mixture: Mixture, keeps_inner: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and `(N, U)` before the activation if it is kept."""
    from .triton import launch_ffn as launch

    linears, order, activation, has_gate = mixture
    x_TD, (up, up_bias, down, down_bias) = unit_stride(x_TD), _with_plain_biases(linears)
    if isinstance(activation, str):
        inner, hidden = launch.run_first_linear(x_TD, up, up_bias, order, activation, has_gate, keeps_inner)
    else:
        inner = launch.run_row_product(x_TD, up, up_bias, None, order, gathers=True)
        hidden = activation(inner).to(x_TD.dtype).contiguous()
    pairs = launch.run_row_product(hidden, down, down_bias, as_float(weights_TK), order, gathers=False)
    return _sum_of_pairs(pairs, order), inner if keeps_inner else None


def compute_gradients(
    grad_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    inner_NU: torch.Tensor,
    mixture: Mixture,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """`g = dy Vᵀ; dw = h·g + dy·b; dV = (w h)ᵀ dy; du = act'(u) (w g); dU = xᵀ du; dx = du Uᵀ`, as in `Needs`."""
    from .triton import launch_ffn as launch

    linears, order = mixture.linears, mixture.order
    grad_TD, x_TD, weights = unit_stride(grad_TD), unit_stride(x_TD), as_float(weights_TK)
    assert weights is not None
    wanted = Wanted(needs.x or needs.up or needs.up_bias, needs.down, needs.weights)
    grad_inner, weighted, dots = _between(grad_TD, weights, inner_NU, mixture, wanted)
    grads: list[torch.Tensor | None] = [None] * len(needs)
    if needs.down:
        grads[4] = launch.run_stack_gradient(weighted, grad_TD, order, _gradient_like(linears.down))
    del weighted
    if needs.x:
        pairs = launch.run_row_product(grad_inner, linears.up.transpose(1, 2), None, None, order, gathers=False)
        grads[0] = _sum_of_pairs(pairs, order)
    if needs.weights:
        grads[1] = _gradient_of_weights(dots, grad_TD, linears, order).to(weights_TK.dtype)
    if needs.up:
        grads[2] = into = _gradient_like(linears.up)
        launch.run_stack_gradient(grad_inner, x_TD, order, into.transpose(1, 2))
    if needs.up_bias:
        grads[3] = launch.run_bias_gradient(grad_inner, None, order, _gradient_like(linears.up_bias), gathers=False)
    if needs.down_bias:
        grads[5] = launch.run_bias_gradient(grad_TD, weights, order, _gradient_like(linears.down_bias), gathers=True)
    return tuple(grads)


def _between(
    grad_TD: torch.Tensor, weights: torch.Tensor, inner_NU: torch.Tensor, mixture: Mixture, wanted: Wanted
) -> tuple[Any, Any, Any]:
    """The members of `Wanted`."""
    from .triton import launch_ffn as launch

    if not any(wanted):
        return None, None, None
    (_, _, down, _), order, activation, has_gate = mixture
    grad_NF: torch.Tensor | None = None
    if wanted.grad_inner or wanted.dots:
        grad_NF = launch.run_row_product(grad_TD, down.transpose(1, 2), None, None, order, gathers=True)
    if isinstance(activation, str):
        return launch.run_activation_gradient(
            inner_NU, grad_NF, weights, order, down.shape[0], activation, has_gate, wanted
        )
    return _activation_gradient(inner_NU, grad_NF, weights, order, activation, wanted)


def _activation_gradient(
    inner_NU: torch.Tensor,
    grad_NF: torch.Tensor | None,
    weights: torch.Tensor,
    order: Order,
    activation: Activation,
    wanted: Wanted,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What `run_activation_gradient` gives, by torch, of an activation that the programs do not know."""
    pair_of_row = order.pair_of_row.long()
    weight_N1 = weights.view(-1, 1)[pair_of_row]
    with torch.enable_grad():
        inner = inner_NU.detach().requires_grad_()
        hidden = activation(inner)
    values = hidden.detach().to(inner.dtype)
    grad_inner = weighted = dots = None
    if wanted.dots and grad_NF is not None:
        dots = weights.new_empty(order.num_pairs)
        dots[pair_of_row] = (grad_NF * values).sum(-1, dtype=dots.dtype)
    if wanted.weighted:
        weighted = (values * weight_N1).to(values.dtype)
    if wanted.grad_inner and grad_NF is not None:
        (grad_inner,) = torch.autograd.grad(hidden, inner, (grad_NF * weight_N1).to(hidden.dtype))
        grad_inner = grad_inner.contiguous()
    return grad_inner, weighted, dots


def _gradient_of_weights(dots: Any, grad_TD: torch.Tensor, linears: Linears, order: Order) -> torch.Tensor:
    """`(T, K)`: `h·g`, and `dy·b` where there is a bias; nothing for experts of other processes."""
    num_experts = linears.down.shape[0]
    grad_TK: torch.Tensor = dots.view(order.index_TK.shape)
    if linears.down_bias is not None:
        bias_TE = grad_TD @ linears.down_bias.to(grad_TD.dtype).t()
        grad_TK = grad_TK + bias_TE.gather(1, order.index_TK.clamp(max=num_experts - 1))
    return grad_TK.masked_fill(order.index_TK >= num_experts, 0) if order.has_sentinel(num_experts) else grad_TK


def _sum_of_pairs(pairs_ND: torch.Tensor, order: Order) -> torch.Tensor:
    """`(T, D)`; torch adds narrow dtypes in float32."""
    return pairs_ND if order.top_k == 1 else pairs_ND.view(*order.index_TK.shape, pairs_ND.shape[1]).sum(1)


def _with_plain_biases(linears: Linears) -> Linears:
    biases = {
        name: part.contiguous() for name, part in linears._asdict().items() if "bias" in name and part is not None
    }
    return linears._replace(**biases)


def _gradient_like(part: Any) -> torch.Tensor:
    """Memory for a gradient: stacks keep their layout, the rest is contiguous."""
    return torch.empty_like(part, memory_format=torch.preserve_format if part.dim() == 3 else torch.contiguous_format)


class _FfnTriton(torch.autograd.Function):
    """`Σ_k w_tk (act(x_t U_e + a_e) V_e + b_e)`, e the k-th expert of token t."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weights_TK: torch.Tensor, *given: Any) -> torch.Tensor:
        mixture = Mixture(Linears(*given[:4]), *given[4:])
        out, inner = compute(x_TD, weights_TK, mixture, keeps_inner=True)
        ctx.save_for_backward(x_TD, weights_TK, inner, *mixture.linears, *mixture.order)
        ctx.rest = mixture[2:]
        return out

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{TRITON_NAME!r} experts have no second derivative, which create_graph=True asks for. Use "
                "model.set_experts_implementation('grouped_mm')."
            )
        x_TD, weights_TK, inner_NU, *saved = ctx.saved_tensors
        with torch.autocast(grad_TD.device.type, enabled=False):
            grads = compute_gradients(
                grad_TD, x_TD, weights_TK, inner_NU, _mixture_of(*saved, *ctx.rest), Needs(*ctx.needs_input_grad[:6])
            )
        return (*grads, None, None, None)


_MIXTURE = (
    "Tensor x, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor index, "
    "Tensor pair_of_row, Tensor segment_end, str activation, bool has_gate"
)


def _mixture_of(*given: Any) -> Mixture:
    """Of the flat arguments of an operation, from `up` to `has_gate`."""
    return Mixture(Linears(*given[:4]), Order(*given[4:7]), *given[7:])


@torch.library.custom_op(
    "peft_moe::triton_ffn", mutates_args=(), schema=f"({_MIXTURE}, bool keeps_inner) -> (Tensor, Tensor)"
)
def ffn_op(*given: Any) -> Any:
    """[`compute`] as one opaque operation; without `keeps_inner` the second output is empty."""
    x, weights, *rest, keeps_inner = given
    out, inner = compute(x, weights, _mixture_of(*rest), keeps_inner)
    return out, x.new_empty(0, rest[0].shape[2]) if inner is None else inner


@ffn_op.register_fake
def _(*given: Any) -> Any:
    x, _, up, _, _, _, index, *_, keeps_inner = given
    return x.new_empty(x.shape), x.new_empty(index.numel() if keeps_inner else 0, up.shape[2])


@torch.library.custom_op(
    "peft_moe::triton_ffn_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor inner, {_MIXTURE}, bool[] needs) -> Tensor[]",
)
def ffn_backward_op(*given: Any) -> list[Any]:
    """[`compute_gradients`] as one operation; only the wanted gradients, in the order of `Needs`."""
    grad, inner, x, weights, *rest, needs = given
    grads = compute_gradients(grad, x, weights, inner, _mixture_of(*rest), Needs(*needs))
    return [found for found in grads if found is not None]


@ffn_backward_op.register_fake
def _(*given: Any) -> list[Any]:
    return [_gradient_like(like) for like, is_needed in zip(given[2:8], given[-1]) if is_needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(output[1], *inputs[:9])
    ctx.rest = inputs[9:11]
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad[:6]
    if grad is None or not any(needs):
        return (None,) * 12
    found = iter(ffn_backward_op(grad, *ctx.saved_tensors, *ctx.rest, list(needs)))
    return (*(next(found) if is_needed else None for is_needed in needs), *(None,) * 6)


ffn_op.register_autograd(_backward_of_op, setup_context=_setup_context)
