"""Starts the programs for FFN experts."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .programs import ffn as programs
from .rows import Order, Wanted
from .tiles import MIN_BLOCK, Tiles, launch, needs_upcast, next_power_of_two, precision_of


# tiles of rows, or of ranks, whose programs run side by side
GROUP = 8
# rows and columns of programs that multiply nothing
ACTIVATION_TILES = Tiles(4, 256, 4, 3)
BIAS_TILES = Tiles(32, 128, 4, 3)


def is_large(device: torch.device, dtype: torch.dtype, *others: torch.dtype) -> bool:
    """Whether a program may keep 128×256 sums: Hopper's and Blackwell's data-centre chips, with narrow dtypes only."""
    if device.type != "cuda" or max(d.itemsize for d in (dtype, *others)) > 2:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def product_tiles(is_short: bool, dtype: torch.dtype, weight_dtype: torch.dtype, large: bool) -> tuple[Tiles, int]:
    """Tiles of a product with weights, and how deep its steps are; few rows per expert (decoding) get short tiles.

    Chosen so that no register spills on sm_80 to sm_100, which is tested, and not yet tuned on a device.
    """
    if dtype == torch.float32:
        return Tiles(MIN_BLOCK if is_short else 32, 64, 8, 2), 16
    depth = 64 if weight_dtype.itemsize == 2 else 32
    if is_short:
        return Tiles(MIN_BLOCK, 128, 4, 3), 2 * depth
    return Tiles(128, 256 if large else 128, 8, 3), depth


def first_tiles(
    is_short: bool, dtype: torch.dtype, weight_dtype: torch.dtype, large: bool, has_gate: bool, activation: str
) -> tuple[Tiles, int]:
    """As above. A gate has a sum of its own for each column, and an activation needs registers, `gelu` most."""
    tiles, depth = product_tiles(is_short, dtype, weight_dtype, large and has_gate and activation != "gelu")
    return tiles._replace(columns=tiles.columns // 2) if has_gate else tiles, depth


def gradient_tiles(dtype: torch.dtype, large: bool) -> tuple[Tiles, int]:
    """Tiles of the gradient of a stack, and how many rows are added in one step."""
    if dtype == torch.float32:
        return Tiles(32, 64, 8, 2), 32
    return Tiles(128, 256 if large else 128, 8, 3), 64


def facts_of(order: Order, num_experts: int, dtype: torch.dtype, *others: torch.dtype) -> dict[str, Any]:
    """What programs ask of pairs, by the names of their arguments; products in `dtype` read or write `others` too."""
    return {
        "pair_of_row": order.pair_of_row,
        "segment_end": order.segment_end,
        "E": num_experts,
        "K": order.top_k,
        "SEGMENTS": next_power_of_two(num_experts),
        "GROUP": GROUP,
        **precision_of(dtype),
        "UPCAST": any(map(needs_upcast, (dtype, *others))),
    }


def choice_of(x: torch.Tensor, w: torch.Tensor, order: Order) -> tuple[bool, torch.dtype, torch.dtype, bool]:
    """The facts that tiles depend on."""
    is_short = order.num_pairs <= MIN_BLOCK * w.shape[0]
    return is_short, x.dtype, w.dtype, is_large(x.device, x.dtype, w.dtype)


def grid_of(order: Order, num_experts: int, tiles: Tiles, width: int) -> tuple[int]:
    """As many programs as any routing needs."""
    num_tiles = min(order.num_pairs, triton.cdiv(order.num_pairs, tiles.rows) + num_experts)
    return (num_tiles * triton.cdiv(width, tiles.columns),)


def buffer(like: torch.Tensor, order: Order, num_experts: int, width: int) -> torch.Tensor:
    """A row for every pair; that of an expert of another process is 0."""
    make = like.new_zeros if order.has_sentinel(num_experts) else like.new_empty
    return make(order.num_pairs, width)


def run_first_linear(
    x_TD: torch.Tensor,
    w_EDU: torch.Tensor,
    bias_EU: torch.Tensor | None,
    order: Order,
    activation: str,
    has_gate: bool,
    keeps_inner: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`(N, U)` before the activation, if it is kept, and `(N, F)` after it; in the order of rows."""
    num_experts, depth, width = w_EDU.shape
    width = width // 2 if has_gate else width
    inner = buffer(x_TD, order, num_experts, w_EDU.shape[2]) if keeps_inner else None
    hidden = x_TD.new_empty(order.num_pairs, width)
    if order.num_pairs:
        tiles, step = first_tiles(*choice_of(x_TD, w_EDU, order), has_gate, activation)
        facts: dict[str, Any] = {"x": x_TD, "w": w_EDU, "bias": bias_EU, "inner": inner, "hidden": hidden}
        facts |= {"D": depth, "F": width, "HAS_GATE": has_gate, "ACTIVATION": activation}
        facts |= dict(zip(("stride_we", "stride_wd", "stride_wf"), w_EDU.stride())) | {"stride_x": x_TD.stride(0)}
        facts |= {"BLOCK_M": tiles.rows, "BLOCK_F": tiles.columns, "BLOCK_D": step}
        facts |= facts_of(order, num_experts, x_TD.dtype, w_EDU.dtype)
        launch(programs.first_linear, grid_of(order, num_experts, tiles, width), tiles, x_TD, facts)
    return inner, hidden


def run_row_product(
    x: torch.Tensor,
    w_EDW: torch.Tensor,
    bias_EW: torch.Tensor | None,
    weights_TK: torch.Tensor | None,
    order: Order,
    *,
    gathers: bool,
) -> torch.Tensor:
    """`w_tk · (x W_e + b_e)` `(N, W)`: from tokens `(T, D)` to rows if it gathers, else from rows to pairs."""
    num_experts, depth, width = w_EDW.shape
    out = buffer(x, order, num_experts, width)
    if order.num_pairs:
        tiles, step = product_tiles(*choice_of(x, w_EDW, order))
        facts: dict[str, Any] = {"x": x, "w": w_EDW, "bias": bias_EW, "weight": weights_TK, "out": out}
        facts |= {"D": depth, "W": width, "GATHERS": gathers}
        facts |= dict(zip(("stride_we", "stride_wd", "stride_ww"), w_EDW.stride())) | {"stride_x": x.stride(0)}
        facts |= {"BLOCK_M": tiles.rows, "BLOCK_W": tiles.columns, "BLOCK_D": step}
        facts |= facts_of(order, num_experts, x.dtype, w_EDW.dtype)
        launch(programs.row_product, grid_of(order, num_experts, tiles, width), tiles, x, facts)
    return out


def run_activation_gradient(
    inner_NU: torch.Tensor,
    grad_NF: torch.Tensor | None,
    weights_TK: torch.Tensor,
    order: Order,
    num_experts: int,
    activation: str,
    has_gate: bool,
    wanted: Wanted,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The members of `Wanted`, as far as they are wanted; only weighted rows do without `grad`, and overwrite it."""
    width = inner_NU.shape[1] // 2 if has_gate else inner_NU.shape[1]
    grad_inner = torch.empty_like(inner_NU) if wanted.grad_inner else None
    weighted = None
    if wanted.weighted:
        weighted = inner_NU.new_empty(order.num_pairs, width) if grad_NF is None else grad_NF
    dots = weights_TK.new_empty(order.num_pairs) if wanted.dots else None
    if order.num_pairs:
        tiles = ACTIVATION_TILES
        facts: dict[str, Any] = {"g": grad_NF, "weight": weights_TK, "inner": inner_NU, "grad_inner": grad_inner}
        facts |= {"dots": dots, "weighted": weighted, "F": width, "ACTIVATION": activation, "HAS_GATE": has_gate}
        facts |= {"HAS_INNER": wanted.grad_inner, "BLOCK_M": tiles.rows, "BLOCK_F": tiles.columns}
        facts |= facts_of(order, num_experts, inner_NU.dtype)
        grid = (triton.cdiv(order.num_pairs, tiles.rows),)
        launch(programs.activation_gradient, grid, tiles, inner_NU, facts)
    return grad_inner, weighted, dots


def run_stack_gradient(r_NR: torch.Tensor, y_TC: torch.Tensor, order: Order, out_ERC: torch.Tensor) -> torch.Tensor:
    """`Σ_n r_n y_tᵀ` over the rows of each expert, written to `out`, whatever its strides."""
    num_experts, height, width = out_ERC.shape
    tiles, step = gradient_tiles(r_NR.dtype, is_large(r_NR.device, r_NR.dtype))
    num_blocks = triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    facts: dict[str, Any] = {"r": r_NR, "y": y_TC, "out": out_ERC, "R": height, "C": width, "stride_y": y_TC.stride(0)}
    facts |= dict(zip(("stride_oe", "stride_or", "stride_oc"), out_ERC.stride()))
    facts |= {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.columns, "BLOCK_N": step}
    facts |= facts_of(order, num_experts, r_NR.dtype, out_ERC.dtype)
    launch(programs.stack_gradient, (num_blocks, num_experts), tiles, r_NR, facts)
    return out_ERC


def run_bias_gradient(
    y: torch.Tensor, weights_TK: torch.Tensor | None, order: Order, out_EW: torch.Tensor, *, gathers: bool
) -> torch.Tensor:
    """`Σ_n w_tk · y` over the rows of each expert, from `(T, W)` if it gathers, else `(N, W)`, written to `out`."""
    num_experts, width = out_EW.shape
    tiles = BIAS_TILES
    facts: dict[str, Any] = {"y": y, "weight": weights_TK, "out": out_EW, "W": width, "stride_y": y.stride(0)}
    facts |= {"GATHERS": gathers, "BLOCK_W": tiles.columns, "BLOCK_N": tiles.rows}
    facts |= facts_of(order, num_experts, y.dtype, out_EW.dtype)
    launch(programs.bias_gradient, (triton.cdiv(width, tiles.columns), num_experts), tiles, y, facts)
    return out_EW
