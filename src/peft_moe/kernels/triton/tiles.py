"""Tile sizes: how much of a tensor a program takes at once; and how a program is compiled and started."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import is_interpreted


MIN_BLOCK = 16
MAX_RANK_BLOCK = 128
ROWS_PER_SPLIT = 2048
MAX_SPLITS = 16
# AMD's GPUs have 64 KiB of shared memory for a block
MAX_HIP_STAGES = 2


class Tiles(NamedTuple):
    """Tile sizes and how many warps share one tile."""

    rows: int
    columns: int
    warps: int
    stages: int


def options(tiles: Tiles) -> dict[str, int]:
    """How a program is compiled for the device at hand."""
    stages = min(tiles.stages, MAX_HIP_STAGES) if torch.version.hip else tiles.stages
    return {"num_warps": tiles.warps, "num_stages": stages}


def launch(program: Any, grid: tuple[int, ...], tiles: Tiles, on: torch.Tensor, facts: dict[str, Any]) -> None:
    """Start a program, whose arguments are found in `facts` by their names; `HAS_X` says whether `x` is there.

    Triton starts programs on the current device, wherever the tensors are, hence `on`; in the interpreter it does
    nothing.
    """
    with torch.cuda.device_of(on):  # type: ignore[no-untyped-call]
        program[grid](*(fact_of(name, facts) for name in program.arg_names), **options(tiles))


def fact_of(name: str, facts: dict[str, Any]) -> Any:
    """An argument of a program."""
    return facts[name] if name in facts else facts[name.removeprefix("HAS_").lower()] is not None


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def rank_block(rank: int) -> int:
    """Ranks in one tile: a power of two, at least what a tensor core takes."""
    return min(max(next_power_of_two(rank), MIN_BLOCK), MAX_RANK_BLOCK)


def shrink_tiles(num_rows: int, num_segments: int, rank: int, dtype: torch.dtype) -> Tiles:
    """Few rows per expert (decoding) get short tiles, wide ranks shallow ones; exact float32 needs more warps.

    Chosen so that no register spills on sm_80 to sm_100, which is tested, and not yet tuned on a device.
    """
    is_short = num_rows <= MIN_BLOCK * num_segments
    if rank_block(rank) > 64:
        return Tiles(MIN_BLOCK if is_short else 64, 32, 8 if dtype == torch.float32 else 4, 3)
    return Tiles(MIN_BLOCK if is_short else 64, 128, 8 if dtype == torch.float32 else 2 if is_short else 4, 3)


def expand_tiles(num_rows: int, num_segments: int, rank: int, dtype: torch.dtype) -> Tiles:
    """As above; wide ranks get narrow tiles, and exact float32 small ones."""
    is_short = num_rows <= MIN_BLOCK * num_segments
    if dtype == torch.float32:
        return Tiles(MIN_BLOCK if is_short else 32, 32 if rank_block(rank) > 64 else 64, 8, 2)
    return Tiles(MIN_BLOCK if is_short else 64, 64 if rank_block(rank) > 64 else 128, 4, 2)


def expand_rank_block(rank: int, dtype: torch.dtype) -> int:
    """Ranks per step of the product."""
    return MIN_BLOCK if dtype == torch.float32 else rank_block(rank)


def gradient_tiles(rank: int, dtype: torch.dtype) -> Tiles:
    """Rows per step of the sum, and columns of the gradient."""
    is_exact = dtype == torch.float32
    return Tiles(32 if is_exact else 64, 64 if is_exact or rank_block(rank) > 64 else 128, 8 if is_exact else 4, 3)


def needs_upcast(dtype: torch.dtype) -> bool:
    """Whether the interpreter computes wrongly with this dtype."""
    return is_interpreted() and dtype == torch.bfloat16


def precision_of(dtype: torch.dtype) -> dict[str, Any]:
    """Exact float32 unless torch was told to allow tf32."""
    allows_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if allows_tf32 else "ieee", "UPCAST": needs_upcast(dtype)}


def splits_of(num_rows: int) -> int:
    """In how many parts a program sums that many rows, so that no program sums for long while others are done."""
    return min(max(num_rows // ROWS_PER_SPLIT, 1), MAX_SPLITS)
