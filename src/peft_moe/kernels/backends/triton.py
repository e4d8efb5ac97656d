"""`triton`: shrink, then expand into the base output; no host sync, no atomics, no permuted copy of the tokens.

A pure function of the shape, [`path_of`], picks one of four paths. Backward of a few pairs takes that of whole examples.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..backend import Backend
from ..case import Case
from ..function import Needs, differentiable
from ..plan import DispatchPlan
from ..triton import is_interpreted
from ..triton.paths import REASONS, Path, path_of
from ..triton.rows import Rows, Sorted, rows_of


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


def path_back(routing: DispatchPlan | Rows, rank: int) -> Path:
    """The path of its backward."""
    path = path_for(routing, rank)
    return "examples" if path == "decode" else path


def steps_of(path: Path) -> Any:
    """The module with the `run_shrink`, `run_expand` and, for backward, `run_weight_gradient` of a path."""
    from ..triton.launch import dense, examples, pairs, sorted_rows

    return {"decode": pairs, "examples": examples, "dense": dense, "sorted": sorted_rows}[path]


def forward(
    x_TD: torch.Tensor,
    base_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_BK: torch.Tensor | None,
    plan: DispatchPlan,
    scaling: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`compute`]."""
    rows = rows_of(plan, is_sorted=path_for(plan, A.shape[1]) == "sorted")
    if torch.compiler.is_compiling():
        return lora_op(x_TD, base_TO, A, B, weights_BK, *tensors_of(rows), rows.tokens_per_example, scaling)  # type: ignore[no-any-return]
    return compute(x_TD, base_TO, A, B, weights_BK, rows, scaling, inplace)


def compute(
    x_TD: torch.Tensor,
    base_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_BK: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, projected)`; `projected` `(N, R)` is `A x` in the order of rows, `(T·E, R)` for all experts where dense."""
    steps = steps_of(path_for(rows, A.shape[1]))
    projected_NR, _ = steps.run_shrink(unit_stride(x_TD), A.contiguous(), rows)
    out_TO = base_TO if inplace else torch.empty_like(base_TO, memory_format=torch.contiguous_format)
    source_TO = unit_stride(base_TO)
    out_TO = steps.run_expand(projected_NR, B.contiguous(), as_float(weights_BK), rows, scaling, source_TO, out_TO)
    return out_TO, projected_NR


def backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_BK: torch.Tensor | None,
    projected_NR: torch.Tensor | None,
    plan: DispatchPlan,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """See [`compute_gradients`]."""
    rows = rows_of(plan, is_sorted=path_for(plan, A.shape[1]) == "sorted")
    return compute_gradients(grad_TO, x_TD, A, B, weights_BK, projected_NR, rows, scaling, needs)


def compute_gradients(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_BK: torch.Tensor | None,
    projected_NR: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """`dB = Σ s·w·h dyᵀ; g = dy Bᵀ; dw = s·h·g; dA = Σ s·w·g xᵀ; dx = Σ_k s·w·g A`."""
    steps = steps_of(path_back(rows, A.shape[1]))
    weights = as_float(weights_BK)
    grad_x = grad_A = grad_B = grad_weights = None
    if needs.B:
        assert projected_NR is not None
        grad_B = steps.run_weight_gradient(projected_NR, grad_TO, weights, rows, scaling)
    if not (needs.A or needs.hidden_states or needs.top_k_weights):
        return None, None, grad_B, None
    wants_weights = needs.top_k_weights and weights_BK is not None
    grad_NR, dots_TK = steps.run_shrink(grad_TO, B.contiguous(), rows, projected_NR if wants_weights else None)
    if dots_TK is not None and weights_BK is not None:
        dots_BSK = dots_TK.view(rows.num_examples, rows.tokens_per_example, rows.top_k)
        grad_weights = (dots_BSK.sum(1) * scaling).to(weights_BK.dtype)
    if needs.A:
        assert x_TD is not None
        grad_A = steps.run_weight_gradient(grad_NR, unit_stride(x_TD), weights, rows, scaling)
    if needs.hidden_states:
        grad_x = grad_TO.new_empty(grad_TO.shape[0], A.shape[2])
        grad_x = steps.run_expand(grad_NR, A.contiguous(), weights, rows, scaling, None, grad_x)
    return grad_x, grad_A, grad_B, grad_weights


def tensors_of(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What an operation of a compiled graph takes of rows."""
    return (rows.index_BK, *(rows.order or (None, None)))


def rows_from(index: Any, token_of_row: Any, segment_end: Any, tokens_per_example: int, num_experts: int) -> Rows:
    """The inverse of [`tensors_of`]."""
    order = None if token_of_row is None else Sorted(token_of_row, segment_end)
    return Rows(index, tokens_per_example, num_experts, order)


@torch.library.custom_op(
    "peft_moe::triton_lora",
    mutates_args=(),
    schema="(Tensor x, Tensor base, Tensor A, Tensor B, Tensor? weights, Tensor index, Tensor? token_of_row, "
    "Tensor? segment_end, int tokens_per_example, float scaling) -> (Tensor, Tensor)",
)
def lora_op(
    x: Any,
    base: Any,
    A: Any,
    B: Any,
    weights: Any,
    index: Any,
    token_of_row: Any,
    segment_end: Any,
    tokens_per_example: int,
    scaling: float,
) -> Any:
    """[`compute`] as one operation that compilers do not look into."""
    rows = rows_from(index, token_of_row, segment_end, tokens_per_example, A.shape[0])
    return compute(x, base, A, B, weights, rows, scaling, False)


@lora_op.register_fake
def _(
    x: Any,
    base: Any,
    A: Any,
    B: Any,
    weights: Any,
    index: Any,
    token_of_row: Any,
    segment_end: Any,
    tokens_per_example: int,
    scaling: float,
) -> Any:
    num_experts, rank = A.shape[:2]
    path = path_for(rows_from(index, token_of_row, segment_end, tokens_per_example, num_experts), rank)
    projected = x.new_empty(x.shape[0] * (num_experts if path == "dense" else index.shape[1]), rank)
    return torch.empty_like(base, memory_format=torch.contiguous_format), projected


@torch.library.custom_op(
    "peft_moe::triton_lora_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor A, Tensor B, Tensor? weights, Tensor projected, Tensor index, "
    "Tensor? token_of_row, Tensor? segment_end, int tokens_per_example, float scaling, bool[] needs) -> Tensor[]",
)
def lora_backward_op(
    grad: Any,
    x: Any,
    A: Any,
    B: Any,
    weights: Any,
    projected: Any,
    index: Any,
    token_of_row: Any,
    segment_end: Any,
    tokens_per_example: int,
    scaling: float,
    needs: list[bool],
) -> list[Any]:
    """[`compute_gradients`] as one operation; only the wanted gradients, in the order of `Needs`."""
    rows = rows_from(index, token_of_row, segment_end, tokens_per_example, A.shape[0])
    grads = compute_gradients(grad.contiguous(), x, A, B, weights, projected, rows, scaling, Needs(*needs))
    return [found for found, is_needed in zip(grads, needs) if is_needed and found is not None]


@lora_backward_op.register_fake
def _(
    grad: Any,
    x: Any,
    A: Any,
    B: Any,
    weights: Any,
    projected: Any,
    index: Any,
    token_of_row: Any,
    segment_end: Any,
    tokens_per_example: int,
    scaling: float,
    needs: list[bool],
) -> list[Any]:
    likes = [x, A, B, weights]
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, is_needed in zip(likes, needs)
        if is_needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, A, B, weights, index, token_of_row, segment_end, ctx.tokens_per_example, ctx.scaling = inputs
    ctx.save_for_backward(x, A, B, weights, output[1], index, token_of_row, segment_end)
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 3, 4)]
    found = iter(
        lora_backward_op(grad, *ctx.saved_tensors, ctx.tokens_per_example, ctx.scaling, needs) if any(needs) else []
    )
    grad_x, grad_A, grad_B, grad_weights = (next(found) if is_needed else None for is_needed in needs)
    grad_base = grad if ctx.needs_input_grad[1] else None
    return grad_x, grad_base, grad_A, grad_B, grad_weights, None, None, None, None, None


lora_op.register_autograd(_backward_of_op, setup_context=_setup_context)


_differentiable = differentiable(forward, backward, is_traceable=True)


def run(
    hidden_states: torch.Tensor,
    base_out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    plan: DispatchPlan | None,
    scaling: float,
    inplace: bool,
) -> torch.Tensor:
    """In place only where nothing is traced: the operation of a compiled graph makes its own output."""
    inplace = inplace and not torch.compiler.is_compiling()
    return _differentiable(hidden_states, base_out, A, B, top_k_weights, plan, scaling, inplace)


BACKEND = Backend(
    name="triton",
    summary="shrink, expand into the base output; CUDA, or the CPU in Triton's interpreter",
    run=run,
    is_usable=is_usable,
    supports=supports,
    traces_fullgraph=True,
    takes_examples=True,
)
