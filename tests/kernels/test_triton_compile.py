"""The Triton programs compile for GPUs that are not here, into registers and shared memory that these GPUs have."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from packaging.version import Version


triton = pytest.importorskip("triton", reason="compiling ahead of time needs the package triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from peft_moe.kernels.triton import tiles as sizes  # noqa: E402
from peft_moe.kernels.triton.launch import dense as dense_launch  # noqa: E402
from peft_moe.kernels.triton.launch import pairs as pairs_launch  # noqa: E402
from peft_moe.kernels.triton.launch.sort import SORT_WARPS, sort_blocks  # noqa: E402
from peft_moe.kernels.triton.programs import dense, examples, pairs, sort, sorted_rows  # noqa: E402


KIB = 1024
# target, shared memory that a block can have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DATA = {"x", "w", "h", "y", "source", "other", "bias", "inner", "hidden", "g", "grad_inner", "weighted", "r"}
WIDTHS = ("D", "W", "F", "R", "C")
INTEGERS = ("num_tokens", "tokens_per_example", "num_choices", "E", "slot")
STRIDES = ("x", "y", "source", "we", "wd", "wf", "ww", "oe", "or", "oc")
POINTERS = dict.fromkeys(("token_of_row", "pair_of_row", "segment_end"), "*i32")
POINTERS |= {"index": "*i64", "weight": "*fp32", "dots": "*fp32"}
RANKS = (8, 16, 32, 64, 128, 256)
E, K = 8, 2
# rows of a call: decoding, and training
ROWS = {"decode": 64, "train": 8192}


def compiled(program, dtype, target, settings, weight_dtype=None, **options):
    """The program as it is launched on contiguous tensors whose widths are multiples of 16."""
    types = POINTERS | dict.fromkeys(DATA, TYPES[dtype]) | {"out": TYPES[dtype], "scaling": "fp32"}
    types |= dict.fromkeys((*INTEGERS, *WIDTHS, *(f"stride_{name}" for name in STRIDES)), "i32")
    if program.__name__.startswith("weight_gradient"):
        types["out"] = "*fp32"
    names = program.arg_names
    if "UPCAST" in names:
        settings = {**settings, **sizes.precision_of(dtype)}
    settings = {name: value for name, value in settings.items() if name in names}
    signature = {name: "constexpr" if name in settings else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name] != "constexpr" and name not in INTEGERS]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(program, signature, constexprs=settings, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def shrink_settings(rank: int, num_rows: int, dtype: torch.dtype, *, has_other: bool):
    tiles = sizes.shrink_tiles(num_rows, E * K, rank, dtype)
    block = sizes.rank_block(rank)
    settings = {"E": E, "K": K, "R": rank, "SEGMENTS": 16, "HAS_OTHER": has_other}
    return {**settings, "BLOCK_M": tiles.rows, "BLOCK_R": block, "BLOCK_C": block, "BLOCK_D": tiles.columns}, tiles


def expand_settings(rank: int, num_rows: int, dtype: torch.dtype, *, has_source: bool):
    tiles = sizes.expand_tiles(num_rows, E, rank, dtype)
    block = sizes.expand_rank_block(rank, dtype)
    settings = {"E": E, "K": K, "R": rank, "SEGMENTS": 8, "HAS_WEIGHT": True, "HAS_SOURCE": has_source}
    return {**settings, "BLOCK_M": tiles.rows, "BLOCK_W": tiles.columns, "BLOCK_R": block, "BLOCK_C": block}, tiles


def gradient_settings(rank: int, dtype: torch.dtype):
    tiles = sizes.gradient_tiles(rank, dtype)
    block = sizes.rank_block(rank)
    settings = {"E": E, "K": K, "R": rank, "SPLITS": 4, "HAS_WEIGHT": True}
    return {**settings, "BLOCK_R": block, "BLOCK_W": tiles.columns, "BLOCK_N": tiles.rows}, tiles


def specialisations(dtype: torch.dtype, *, is_thorough: bool):
    """Name, program, settings, tiles, and whether Hopper's warp-group products are expected."""
    for rank in RANKS if is_thorough else (16, 128):
        for phase, num_rows in ROWS.items():
            for flag in (True, False) if is_thorough else (True,):
                what = f"r{rank} {phase} {flag}"
                settings, tiles = shrink_settings(rank, num_rows, dtype, has_other=flag)
                yield f"shrink {what}", sorted_rows.shrink, settings, tiles, tiles.rows >= 64
                settings, tiles = expand_settings(rank, num_rows // K, dtype, has_source=flag)
                yield f"expand {what}", sorted_rows.expand, settings, tiles, tiles.rows >= 64
                if rank < 128 and not is_thorough:
                    continue
                # all slots at once: tiles are those of a rank K times as wide
                settings, tiles = shrink_settings(K * rank, num_rows, dtype, has_other=flag)
                settings["R"] = rank
                yield f"shrink_examples {what}", examples.shrink_examples, settings, tiles, tiles.rows >= 64
                settings, tiles = expand_settings(K * rank, num_rows // K, dtype, has_source=flag)
                settings["R"] = rank
                yield f"expand_examples {what}", examples.expand_examples, settings, tiles, tiles.rows >= 64
        settings, tiles = gradient_settings(rank, dtype)
        wants_wgmma = settings["BLOCK_R"] >= 64
        yield f"gradient r{rank}", sorted_rows.weight_gradient, settings, tiles, wants_wgmma
        yield f"gradient_examples r{rank}", examples.weight_gradient_examples, settings, tiles, wants_wgmma
    for rank in (2, 8, 16, 32) if is_thorough else (16,):
        yield from dense_specialisations(rank, dtype)
    for rank in (4, 64):
        tiles = sizes.Tiles(1, 1, pairs_launch.WARPS, 3)
        shrink, expand = pairs_launch.shrink_settings(), pairs_launch.expand_settings(rank)
        shape = {"K": K, "R": rank, "HAS_WEIGHT": True}
        yield f"shrink_pairs r{rank}", pairs.shrink_pairs, shape | shrink, tiles, False
        yield f"expand_pairs r{rank}", pairs.expand_pairs, shape | expand, tiles, False
    for num_experts in (8, 256):
        block_tokens, block_experts = sort_blocks(num_experts)
        settings = {"K": K, "BLOCK_T": block_tokens, "BLOCK_E": block_experts}
        yield f"sort e{num_experts}", sort.sort_by_expert, settings, sizes.Tiles(1, 1, SORT_WARPS, 3), False


def dense_specialisations(rank: int, dtype: torch.dtype):
    """As above, for all experts at once: tiles are those of a rank E times as wide."""
    settings, tiles = shrink_settings(E * rank, ROWS["train"], dtype, has_other=True)
    yield f"shrink_dense r{rank}", dense.shrink_dense, settings | {"R": rank}, tiles, True
    settings, tiles = expand_settings(dense_launch.NARROW, ROWS["train"], dtype, has_source=True)
    settings["BLOCK_C"] = sizes.expand_rank_block(E * rank, dtype)
    yield f"expand_dense r{rank}", dense.expand_dense, settings | {"R": rank}, tiles, True
    settings, tiles = gradient_settings(dense_launch.NARROW, dtype)
    settings |= {"R": rank, "BLOCK_C": sizes.rank_block(E * rank)}
    yield f"gradient_dense r{rank}", dense.weight_gradient_dense, settings, tiles, settings["BLOCK_C"] >= 64


def stack_bytes(cubin: bytes, tmp_path: Path) -> int:
    """What registers have spilled to memory."""
    file = tmp_path / "program.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found and int(found[1]) > 0, usage
    return int(found[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "is_thorough"),
    [
        ("sm_90", torch.bfloat16, False),
        pytest.param("sm_90", torch.float16, False, marks=pytest.mark.exhaustive),
        pytest.param("sm_90", torch.float32, False, marks=pytest.mark.exhaustive),
        ("sm_80", torch.bfloat16, False),
        ("sm_100", torch.bfloat16, False),
        ("gfx942", torch.bfloat16, False),
        pytest.param("sm_90", torch.bfloat16, True, marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: {True: "thorough", False: "typical"}.get(value, str(value).removeprefix("torch.")),
)
def test_no_spill_and_no_more_memory_than_there_is(name, dtype, is_thorough, tmp_path):
    if name == "sm_100" and Version(triton.__version__) < Version("3.7"):
        pytest.skip(f"triton {triton.__version__} spills 8 bytes where newer ones do not")
    target, most_shared = TARGETS[name]
    problems = []
    for what, program, settings, tiles, wants_wgmma in specialisations(dtype, is_thorough=is_thorough):
        stages = min(tiles.stages, sizes.MAX_HIP_STAGES) if target.backend == "hip" else tiles.stages
        kernel = compiled(program, dtype, target, settings, num_warps=tiles.warps, num_stages=stages)
        if kernel.metadata.shared > most_shared:
            problems.append(f"{what}: {kernel.metadata.shared} bytes of shared memory, {most_shared} are there")
        if target.backend == "cuda" and (stack := stack_bytes(kernel.asm["cubin"], tmp_path)):
            problems.append(f"{what}: {stack} bytes spilled")
        if name == "sm_90" and dtype != torch.float32 and wants_wgmma and "wgmma" not in kernel.asm["ptx"]:
            problems.append(f"{what}: no wgmma")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_spill_is_noticed(tmp_path):
    settings, _ = expand_settings(16, 8192, torch.float32, has_source=True)
    settings |= {"BLOCK_M": 64, "BLOCK_W": 128, "BLOCK_R": 32}
    kernel = compiled(sorted_rows.expand, torch.float32, TARGETS["sm_90"][0], settings, num_warps=4, num_stages=2)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) > 0
