"""`triton`: shrink, then expand into the base output; no host sync, no atomics, no permuted copy of the tokens.

A pure function of the shape, [`path_of`], picks one of four paths. Backward of a few pairs takes that of whole
examples.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..call import Call, Gradients, Needs, differentiable
from ..plan import DispatchPlan
from ..triton import is_interpreted
from ..triton.paths import REASONS, Path, path_of
from ..triton.rows import Rows, Sorted, rows_of
from . import Backend, Case


def is_usable() -> tuple[bool, str]:
    """Needs Triton, and a GPU or Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed; CUDA builds of torch bring it along"
    if is_interpreted():
        return True, "Triton's interpreter is switched on (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1 switches it on)"
    return True, "Triton and a CUDA device are there"


def supports(case: Case) -> tuple[bool, str]:
    """Tensors where Triton runs, no float64; names the path."""
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"tensor cores take float32, bfloat16 and float16, not {case.dtype}"
    if case.device != ("cpu" if is_interpreted() else "cuda"):
        where = "the CPU, where the interpreter runs" if is_interpreted() else "CUDA"
        return False, f"it takes tensors on {where}, but these are on {case.device!r}"
    path = path_of(case.num_tokens, case.tokens_per_example, case.num_experts, max(case.top_k, 1), case.rank)
    return True, f"path {path!r}: {REASONS[path]}"


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Rows may be anywhere, but the elements of a row lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_float(weights_BK: torch.Tensor | None) -> torch.Tensor | None:
    """Weights as the programs read them."""
    return None if weights_BK is None else weights_BK.float().contiguous()


def path_for(routing: DispatchPlan | Rows, rank: int) -> Path:
    """The path of a call."""
    return path_of(routing.num_tokens, routing.tokens_per_example, routing.num_experts, routing.top_k, rank)


def rows_for(call: Call) -> Rows:
    """The rows of a call, sorted where its path wants that."""
    return rows_of(call.plan, is_sorted=path_for(call.plan, call.A.shape[1]) == "sorted")


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`compute`]."""
    if torch.compiler.is_compiling():
        return lora_op(*tensors_of(call, rows_for(call)))  # type: ignore[no-any-return]
    return compute(call, rows_for(call))


def compute(call: Call, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, projected)`; `projected` is `A x` by row `(N, R)`, where dense for all experts `(T·E, R)`."""
    from ..triton.launch_lora import run_expand, run_shrink

    path = path_for(rows, call.A.shape[1])
    projected_NR, _ = run_shrink(path, unit_stride(call.x), call.A.contiguous(), rows)
    out = call.base if call.inplace else torch.empty_like(call.base, memory_format=torch.contiguous_format)
    source, weights = unit_stride(call.base), as_float(call.weights)
    return run_expand(path, projected_NR, call.B.contiguous(), weights, rows, call.scaling, source, out), projected_NR


def backward(grad_TO: torch.Tensor, call: Call, projected_NR: torch.Tensor, needs: Needs) -> Gradients:
    """See [`compute_gradients`]."""
    return compute_gradients(grad_TO, call, projected_NR, rows_for(call), needs)


def compute_gradients(
    grad_TO: torch.Tensor, call: Call, projected_NR: torch.Tensor, rows: Rows, needs: Needs
) -> Gradients:
    """`dB = Σ s·w·h dyᵀ; g = dy Bᵀ; dw = s·h·g; dA = Σ s·w·g xᵀ; dx = Σ_k s·w·g A`."""
    from ..triton.launch_lora import run_expand, run_shrink, run_weight_gradient

    A, B, scaling, weights = call.A, call.B, call.scaling, as_float(call.weights)
    path = path_for(rows, A.shape[1])
    path = "examples" if path == "decode" else path
    grad_x = grad_A = grad_B = grad_weights = None
    if needs.B:
        grad_B = run_weight_gradient(path, projected_NR, grad_TO, weights, rows, scaling)
    if not (needs.A or needs.x or needs.weights):
        return None, None, grad_B, None
    wants_weights = needs.weights and call.weights is not None
    grad_NR, dots_TK = run_shrink(path, grad_TO, B.contiguous(), rows, projected_NR if wants_weights else None)
    if dots_TK is not None and call.weights is not None:
        dots_BSK = dots_TK.view(rows.num_examples, rows.tokens_per_example, rows.top_k)
        grad_weights = (dots_BSK.sum(1) * scaling).to(call.weights.dtype)
    if needs.A:
        grad_A = run_weight_gradient(path, grad_NR, unit_stride(call.x), weights, rows, scaling)
    if needs.x:
        grad_x = grad_TO.new_empty(grad_TO.shape[0], A.shape[2])
        grad_x = run_expand(path, grad_NR, A.contiguous(), weights, rows, scaling, None, grad_x)
    return grad_x, grad_A, grad_B, grad_weights


_ROUTING = "Tensor index, Tensor? token_of_row, Tensor? segment_end, int tokens_per_example, float scaling"


def tensors_of(call: Call, rows: Rows) -> tuple[Any, ...]:
    """What an operation of a compiled graph takes of a call."""
    order = rows.order or (None, None)
    return (*call[:5], rows.index_BK, *order, rows.tokens_per_example, call.scaling)


def from_tensors(
    x: Any, base: Any, A: Any, B: Any, weights: Any, index: Any, token_of_row: Any, segment_end: Any, *numbers: Any
) -> tuple[Call, Rows]:
    """The inverse of [`tensors_of`]; the call has no plan."""
    order = None if token_of_row is None else Sorted(token_of_row, segment_end)
    tokens_per_example, scaling = numbers
    call = Call(x, base, A, B, weights, None, scaling, False)  # type: ignore[arg-type]
    return call, Rows(index, tokens_per_example, A.shape[0], order)


@torch.library.custom_op(
    "peft_moe::triton_lora",
    mutates_args=(),
    schema=f"(Tensor x, Tensor base, Tensor A, Tensor B, Tensor? weights, {_ROUTING}) -> (Tensor, Tensor)",
)
def lora_op(*given: Any) -> Any:
    """[`compute`] as one operation that compilers do not look into."""
    return compute(*from_tensors(*given))


@lora_op.register_fake
def _(*given: Any) -> Any:
    call, rows = from_tensors(*given)
    num_experts, rank = call.A.shape[:2]
    columns = num_experts if path_for(rows, rank) == "dense" else rows.top_k
    out = torch.empty_like(call.base, memory_format=torch.contiguous_format)
    return out, call.x.new_empty(call.x.shape[0] * columns, rank)


@torch.library.custom_op(
    "peft_moe::triton_lora_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor projected, bool[] needs, Tensor x, Tensor A, Tensor B, Tensor? weights, "
    f"{_ROUTING}) -> Tensor[]",
)
def lora_backward_op(grad: Any, projected: Any, needs: list[bool], x: Any, *rest: Any) -> list[Any]:
    """[`compute_gradients`] as one operation; only the wanted gradients, in the order of `Needs`."""
    call, rows = from_tensors(x, None, *rest)
    grads = compute_gradients(grad.contiguous(), call, projected, rows, Needs(*needs))
    return [found for found, is_needed in zip(grads, needs) if is_needed and found is not None]


@lora_backward_op.register_fake
def _(grad: Any, projected: Any, needs: list[bool], *given: Any) -> list[Any]:
    likes = [like for like, is_needed in zip(given[:4], needs) if is_needed]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, *rest = inputs
    ctx.save_for_backward(output[1], x, *rest[:6])
    ctx.numbers = rest[6:]
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 10
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 3, 4)]
    projected, *saved = ctx.saved_tensors
    found = iter(lora_backward_op(grad, projected, needs, *saved, *ctx.numbers) if any(needs) else [])
    grad_x, grad_A, grad_B, grad_weights = (next(found) if is_needed else None for is_needed in needs)
    grad_base = grad if ctx.needs_input_grad[1] else None
    return grad_x, grad_base, grad_A, grad_B, grad_weights, None, None, None, None, None


lora_op.register_autograd(_backward_of_op, setup_context=_setup_context)

_differentiable = differentiable(forward, backward, is_traceable=True)


def run(call: Call) -> torch.Tensor:
    """In place only where nothing is traced: the operation of a compiled graph makes its own output."""
    return _differentiable(call._replace(inplace=call.inplace and not torch.compiler.is_compiling()))


BACKEND = Backend(
    name="triton",
    summary="shrink, expand into the base output; CUDA, or the CPU in Triton's interpreter",
    run=run,
    is_usable=is_usable,
    supports=supports,
    traces_fullgraph=True,
    takes_examples=True,
)
