"""`segment`: tokens sorted by expert, handled in chunks small enough that temporaries stay in the L2 cache (CPU only).

A chunk is a run of rows, of one or of many experts. Its tokens are gathered into one workspace, multiplied expert by
expert and added back before the next chunk is touched, so no buffer of the size of all rows times a width exists. Rows
are gathered again in backward, which costs less on a CPU than fresh memory does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backend import Backend
from ..case import Case
from ..function import Needs, differentiable
from ..plan import DispatchPlan


# measured: times are flat from 1 to 4 MiB; less means more calls, more means fresh pages from the system
WORKSPACE_BYTES = 2**20
MIN_CHUNK_ROWS = 32


class Chunk(NamedTuple):
    """Consecutive rows of the plan, as many as the workspace holds: `sizes[i]` rows of `experts[i]`."""

    start: int
    stop: int
    token: torch.Tensor
    experts: list[int]
    sizes: list[int]

    def pieces(self, rows_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the rows of each expert, out of a tensor with all rows."""
        return torch.split_with_sizes(rows_N[self.start : self.stop], self.sizes)


def supports(case: Case) -> tuple[bool, str]:
    """Only tensors on the CPU, because the loads of the experts are read by the host."""
    if case.device != "cpu":
        return False, f"it reads the expert load on the host and is for 'cpu', but the tensors are on {case.device!r}"
    return True, "tensors on the CPU"


def chunks_of(plan: DispatchPlan, max_rows: int) -> list[Chunk]:
    """Cut the rows of the plan; kept on the plan for backward and for the next linear."""
    key = ("segment", max_rows)
    if key not in plan.derived:
        plan.derived[key] = cut(plan, max_rows)
    chunks: list[Chunk] = plan.derived[key]
    return chunks


def cut(plan: DispatchPlan, max_rows: int) -> list[Chunk]:
    """Chunks of `max_rows` rows (the last one may be shorter); experts without rows appear in none."""
    chunks = []
    start, room = 0, max_rows
    experts: list[int] = []
    sizes: list[int] = []
    for expert, load in enumerate(plan.expert_load_on_host):
        while load > 0:
            size = min(load, room)
            experts.append(expert)
            sizes.append(size)
            load, room = load - size, room - size
            if room == 0:
                chunks.append(
                    Chunk(start, start + max_rows, plan.token_of_row[start : start + max_rows], experts, sizes)
                )
                start, room, experts, sizes = start + max_rows, max_rows, [], []
    if experts:
        stop = start + max_rows - room
        chunks.append(Chunk(start, stop, plan.token_of_row[start:stop], experts, sizes))
    return chunks


class Workspace:
    """Room for the gathered rows of one chunk, of either width."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, num_rows: int) -> None:
        width = max(A.shape[2], B.shape[2])
        self.max_rows = max(MIN_CHUNK_ROWS, WORKSPACE_BYTES // max(1, width * A.element_size()))
        self.flat = A.new_empty(min(self.max_rows, num_rows) * width)

    def rows(self, chunk: Chunk, width: int) -> torch.Tensor:
        """`(rows of the chunk, width)`, overwritten by the next call."""
        num_rows = chunk.stop - chunk.start
        return self.flat[: num_rows * width].view(num_rows, width)

    def gather(self, chunk: Chunk, tokens_TW: torch.Tensor) -> torch.Tensor:
        """The rows of the chunk's tokens."""
        return torch.index_select(tokens_TW, 0, chunk.token, out=self.rows(chunk, tokens_TW.shape[1]))


def row_weights(plan: DispatchPlan, weights_TK: torch.Tensor | None, scaling: float) -> torch.Tensor | float:
    """Weight times scaling in the order of rows, `(N, 1)`; the bare scaling where every weight is 1."""
    if weights_TK is None:
        return scaling
    return weights_TK.reshape(-1).index_select(0, plan.pair_of_row).unsqueeze(1) * scaling


def forward(
    x_TD: torch.Tensor,
    base_TO: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_TK: torch.Tensor | None,
    plan: DispatchPlan,
    scaling: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather and project chunk by chunk, weigh all rows at once in rank space, expand and add chunk by chunk."""
    out_TO = base_TO if inplace else base_TO.clone()
    projected_NR = A.new_empty(plan.num_tokens * plan.top_k, A.shape[1])
    space = Workspace(A, B, projected_NR.shape[0])
    chunks = chunks_of(plan, space.max_rows)
    A_of, B_of = A.transpose(1, 2).unbind(0), B.unbind(0)
    for chunk in chunks:
        x = space.gather(chunk, x_TD).split_with_sizes(chunk.sizes)
        for expert, rows, projected in zip(chunk.experts, x, chunk.pieces(projected_NR)):
            torch.mm(rows, A_of[expert], out=projected)
    weighted_NR = (projected_NR * row_weights(plan, weights_TK, scaling)).to(A.dtype)
    for chunk in chunks:
        update = space.rows(chunk, B.shape[2])
        pieces = torch.split_with_sizes(update, chunk.sizes)
        for expert, rows, weighted in zip(chunk.experts, pieces, chunk.pieces(weighted_NR)):
            torch.mm(weighted, B_of[expert], out=rows)
        out_TO.index_add_(0, chunk.token, update)
    return out_TO, projected_NR


class PerExpertSum:
    """The gradient of `A` or `B`, summed over the chunks of each expert.

    Narrow dtypes are summed in float32: with many chunks the roundings of a bfloat16 sum would add up.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.is_narrow = like.element_size() < 4
        self.dtype = like.dtype
        self.sums = torch.empty_like(like, dtype=torch.float32 if self.is_narrow else like.dtype)
        self.of_expert = self.sums.unbind(0)
        self.seen = [False] * len(self.of_expert)

    def add(self, chunk: Chunk, lefts_NR: torch.Tensor, rights: tuple[torch.Tensor, ...]) -> None:
        """Add `leftᵀ right` of each expert of a chunk."""
        lefts = torch.split_with_sizes(lefts_NR[chunk.start : chunk.stop].t(), chunk.sizes, dim=1)
        for expert, left, right in zip(chunk.experts, lefts, rights):
            into, seen = self.of_expert[expert], self.seen[expert]
            self.seen[expert] = True
            if self.is_narrow:
                product = torch.mm(left, right)
                into.add_(product) if seen else into.copy_(product)
            elif seen:
                into.addmm_(left, right)
            else:
                torch.mm(left, right, out=into)

    def result(self) -> torch.Tensor:
        """The sums, with zeros for experts that were never added to."""
        for into, seen in zip(self.of_expert, self.seen):
            if not seen:
                into.zero_()
        return self.sums.to(self.dtype)


def backward(
    grad_TO: torch.Tensor,
    x_TD: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weights_TK: torch.Tensor | None,
    projected_NR: torch.Tensor,
    plan: DispatchPlan,
    scaling: float,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """`dB = (s·w·h)ᵀ dy; g = dy Bᵀ; dw = s·Σ_r h g; dh = s·w·g; dA = dhᵀ x; dx = dh A`, chunk by chunk."""
    space = Workspace(A, B, plan.num_tokens * plan.top_k)
    chunks = chunks_of(plan, space.max_rows)
    weights = row_weights(plan, weights_TK, scaling)
    grad_weights = None
    weighted_NR = (projected_NR * weights).to(A.dtype) if needs.B else None
    grad_NR, grad_B = through_B(grad_TO, B, weighted_NR, chunks, space)
    if needs.top_k_weights and weights_TK is not None:
        grad_rows_N = (projected_NR.to(weights_TK.dtype) * grad_NR).sum(-1).mul_(scaling).to(weights_TK.dtype)
        grad_weights = grad_rows_N[plan.row_of_pair]
    if not (needs.A or needs.hidden_states):
        return None, None, grad_B, grad_weights
    grad_NR = (grad_NR * weights).to(A.dtype)
    grad_x, grad_A = through_A(grad_NR, x_TD, A, plan, chunks, space, needs)
    return grad_x, grad_A, grad_B, grad_weights


def through_B(
    grad_TO: torch.Tensor, B: torch.Tensor, weighted_NR: torch.Tensor | None, chunks: list[Chunk], space: Workspace
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of the projection, unweighted, and that of B unless `weighted_NR` is `None`: dy is gathered once."""
    sum_B = None if weighted_NR is None else PerExpertSum(B)
    grad_NR = B.new_empty(chunks[-1].stop if chunks else 0, B.shape[1])
    B_of = B.transpose(1, 2).unbind(0)
    for chunk in chunks:
        dy = space.gather(chunk, grad_TO).split_with_sizes(chunk.sizes)
        for expert, rows, grad in zip(chunk.experts, dy, chunk.pieces(grad_NR)):
            torch.mm(rows, B_of[expert], out=grad)
        if sum_B is not None and weighted_NR is not None:
            sum_B.add(chunk, weighted_NR, dy)
    return grad_NR, None if sum_B is None else sum_B.result()


def through_A(
    grad_NR: torch.Tensor,
    x_TD: torch.Tensor,
    A: torch.Tensor,
    plan: DispatchPlan,
    chunks: list[Chunk],
    space: Workspace,
    needs: Needs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gather x per chunk for the gradient of A, then reuse the room for the chunk's part of dx."""
    sum_A = PerExpertSum(A) if needs.A else None
    grad_x = A.new_zeros(plan.num_tokens, A.shape[2]) if needs.hidden_states else None
    A_of = A.unbind(0)
    for chunk in chunks:
        if sum_A is not None:
            sum_A.add(chunk, grad_NR, space.gather(chunk, x_TD).split_with_sizes(chunk.sizes))
        if grad_x is not None:
            part = space.rows(chunk, A.shape[2])
            pieces = torch.split_with_sizes(part, chunk.sizes)
            for expert, rows, grad in zip(chunk.experts, pieces, chunk.pieces(grad_NR)):
                torch.mm(grad, A_of[expert], out=rows)
            grad_x.index_add_(0, chunk.token, part)
    return grad_x, None if sum_A is None else sum_A.result()


BACKEND = Backend(
    name="segment",
    summary="tokens sorted by expert, in chunks that fit the cache; CPU only",
    run=differentiable(forward, backward),
    supports=supports,
)
