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

from peft_moe.kernels.triton import launch, programs  # noqa: E402


KIB = 1024
# target, shared memory that a block can have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DATA = {"x", "w", "h", "y", "source", "other"}
INTEGERS = ("num_tokens", "D", "W", "stride_x", "stride_y", "stride_source", "slot")
RANKS = (8, 16, 32, 64, 128, 256)
E, K = 8, 2
# rows of a call: decoding, and training
ROWS = {"decode": 64, "train": 8192}


def compiled(program, dtype, target, settings, **options):
    """The program as it is launched on contiguous tensors whose widths are multiples of 16."""
    types = dict.fromkeys(DATA, TYPES[dtype]) | {"out": TYPES[dtype]} | dict.fromkeys(INTEGERS, "i32")
    types |= {"token_of_row": "*i32", "segment_end": "*i32", "weight": "*fp32", "dots": "*fp32", "scaling": "fp32"}
    types |= {"first_segment": "i32"}
    if program is programs.weight_gradient:
        types["out"] = "*fp32"
    names = program.arg_names
    settings = {**settings, **launch.precision_of(dtype)}
    signature = {name: "constexpr" if name in settings else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("D", "W")]
    aligned += [i for i, name in enumerate(names) if name.startswith("stride_")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(program, signature, constexprs=settings, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def shrink_settings(rank: int, num_rows: int, dtype: torch.dtype, *, has_other: bool):
    tiles = launch.shrink_tiles(num_rows, E * K, rank, dtype)
    block = launch.rank_block(rank)
    settings = {"E": E, "K": K, "R": rank, "SEGMENTS": 16, "HAS_OTHER": has_other}
    return {**settings, "BLOCK_M": tiles.rows, "BLOCK_R": block, "BLOCK_D": tiles.columns}, tiles


def expand_settings(rank: int, num_rows: int, dtype: torch.dtype, *, has_source: bool):
    tiles = launch.expand_tiles(num_rows, E, rank, dtype)
    block = launch.expand_rank_block(rank, dtype)
    settings = {"E": E, "K": K, "R": rank, "SEGMENTS": 8, "HAS_WEIGHT": True, "HAS_SOURCE": has_source}
    return {**settings, "BLOCK_M": tiles.rows, "BLOCK_W": tiles.columns, "BLOCK_R": block}, tiles


def gradient_settings(rank: int, dtype: torch.dtype):
    tiles = launch.gradient_tiles(rank, dtype)
    block = launch.rank_block(rank)
    settings = {"E": E, "K": K, "R": rank, "SPLITS": 4, "HAS_WEIGHT": True}
    return {**settings, "BLOCK_R": block, "BLOCK_W": tiles.columns, "BLOCK_N": tiles.rows}, tiles


def specialisations(dtype: torch.dtype, *, is_thorough: bool):
    """Name, program, settings, tiles, and whether Hopper's warp-group products are expected."""
    for rank in RANKS if is_thorough else (16, 128):
        for phase, num_rows in ROWS.items():
            for flag in (True, False) if is_thorough else (True,):
                settings, tiles = shrink_settings(rank, num_rows, dtype, has_other=flag)
                yield f"shrink r{rank} {phase} {flag}", programs.shrink, settings, tiles, tiles.rows >= 64
                settings, tiles = expand_settings(rank, num_rows // K, dtype, has_source=flag)
                yield f"expand r{rank} {phase} {flag}", programs.expand, settings, tiles, tiles.rows >= 64
        settings, tiles = gradient_settings(rank, dtype)
        yield f"gradient r{rank}", programs.weight_gradient, settings, tiles, settings["BLOCK_R"] >= 64


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
    ("name", "dtype"),
    [
        ("sm_90", torch.bfloat16),
        ("sm_90", torch.float16),
        ("sm_90", torch.float32),
        ("sm_80", torch.bfloat16),
        ("sm_100", torch.bfloat16),
        ("gfx942", torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_no_spill_and_no_more_memory_than_there_is(name, dtype, tmp_path):
    if name == "sm_100" and Version(triton.__version__) < Version("3.7"):
        pytest.skip(f"triton {triton.__version__} spills 8 bytes where newer ones do not")
    target, most_shared = TARGETS[name]
    is_thorough = name == "sm_90" and dtype == torch.bfloat16
    problems = []
    for what, program, settings, tiles, wants_wgmma in specialisations(dtype, is_thorough=is_thorough):
        stages = min(tiles.stages, launch.MAX_HIP_STAGES) if target.backend == "hip" else tiles.stages
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
    kernel = compiled(programs.expand, torch.float32, TARGETS["sm_90"][0], settings, num_warps=4, num_stages=2)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) > 0
