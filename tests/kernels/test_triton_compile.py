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

from peft_moe.kernels.triton import launch_ffn as ffn_launch  # noqa: E402
from peft_moe.kernels.triton import launch_lora  # noqa: E402
from peft_moe.kernels.triton import tiles as sizes  # noqa: E402
from peft_moe.kernels.triton.programs import ffn, sort, sorted_rows  # noqa: E402
from peft_moe.kernels.triton.rows import Rows, sort_blocks  # noqa: E402


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


def compiled(program, dtype, target, settings, others=None, **options):
    """The program as launched on contiguous tensors whose widths are multiples of 16; `others` are other dtypes."""
    types = POINTERS | dict.fromkeys(DATA, TYPES[dtype]) | {"out": TYPES[dtype], "scaling": "fp32"}
    types |= dict.fromkeys((*INTEGERS, *WIDTHS, *(f"stride_{name}" for name in STRIDES)), "i32")
    if program.__name__.startswith("weight_gradient"):
        types["out"] = "*fp32"
    types |= {name: TYPES[other] for name, other in (others or {}).items()}
    names = program.arg_names
    settings = {**settings, **sizes.precision_of(dtype)}
    settings = {name: value for name, value in settings.items() if name in names}
    signature = {name: "constexpr" if name in settings else types[name] for name in names}
    aligned = [
        i for i, name in enumerate(names) if signature[name] != "constexpr" and name not in (*INTEGERS, "scaling")
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(program, signature, constexprs=settings, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def specialisations(dtype: torch.dtype, *, is_thorough: bool):
    """Name, program, settings, tiles, and whether Hopper's warp-group products are expected."""
    for path in launch_lora.PROGRAMS:
        ranks = {"decode": (4, 64), "dense": (2, 8, 16, 32) if is_thorough else (16,)}.get(path)
        for rank in ranks or (RANKS if is_thorough else (16, 128)):
            # side by side, the ranks of K experts come to a tile of typical width sooner
            is_typical = is_thorough or path == "sorted" or (path == "examples" and rank == 128)
            for phase in ROWS if is_typical and path != "decode" else ("train",):
                for flag in (True, False) if is_thorough else (True,):
                    yield from specialisations_of(path, rank, phase, flag, dtype)
    for num_experts in (8, 256):
        tiles, settings = sort_blocks(num_experts)
        yield f"sort e{num_experts}", sort.sort_by_expert, settings | {"K": K}, tiles, False


def specialisations_of(path: str, rank: int, phase: str, flag: bool, dtype: torch.dtype):
    """The programs of a path as the launchers cut them; `flag` is whether there is a `source` or an `other`."""
    num_tokens = ROWS[phase] // K
    tokens_per_example = num_tokens // 2 if path == "examples" else 1
    rows = Rows(torch.empty(num_tokens // tokens_per_example, K, device="meta"), tokens_per_example, E, None)
    shape = {"E": E, "K": K, "R": rank, "HAS_WEIGHT": True, "HAS_OTHER": flag, "HAS_SOURCE": flag}
    plans = {
        "shrink": launch_lora.shrink_plan(path, rows, rank, dtype),
        "expand": launch_lora.expand_plan(path, rows, rank, 4096, dtype),
        "weight_gradient": launch_lora.gradient_plan(path, rows, rank, 4096, dtype),
    }
    for step, plan in plans.items():
        program, sizes_of = getattr(launch_lora.PROGRAMS[path], step), plan.sizes
        is_repeated = step == "weight_gradient" and (phase != "train" or not flag)
        if program is not None and not is_repeated:
            rows_of_tile = sizes_of["BLOCK_C"] if step == "weight_gradient" else plan.tiles.rows
            name = f"{step} {path} r{rank} {phase} {flag}"
            yield name, program, shape | sizes_of, plan.tiles, path != "decode" and rows_of_tile >= 64


# experts, experts per token, activation, whether there is a gate, biases, a transposed layout
MIXTURES = {
    "mixtral": (8, 2, "silu", True, False, False),
    "olmoe": (64, 8, "silu", True, False, False),
    "moe_llava": (4, 2, "gelu", False, True, False),
    "gpt_oss": (32, 4, "gelu_tanh", True, True, True),
    "gelu": (8, 2, "gelu", True, False, False),
    "relu2": (8, 2, "relu2", False, False, True),
}


def ffn_specialisations(mixture: str, phase: str, dtype: torch.dtype, weight_dtype: torch.dtype, is_large: bool):
    """Name, program, settings, tiles, and whether Hopper's warp-group products are expected."""
    num_experts, top_k, activation, has_gate, has_bias, is_transposed = MIXTURES[mixture]
    facts = (phase == "decode", dtype, weight_dtype, is_large)
    shape = {"E": num_experts, "K": top_k, "SEGMENTS": sizes.next_power_of_two(num_experts), "GROUP": ffn_launch.GROUP}
    shape |= {"HAS_BIAS": has_bias, "HAS_GATE": has_gate, "ACTIVATION": activation, "HAS_INNER": phase == "train"}
    wants_wgmma = phase == "train"

    def product(tiles: sizes.Tiles, depth: int, unit: str, **more):
        blocks = {"BLOCK_M": tiles.rows, "BLOCK_F": tiles.columns, "BLOCK_W": tiles.columns, "BLOCK_D": depth}
        return shape | blocks | {unit: 1} | more

    tiles, depth = ffn_launch.first_tiles(*facts, has_gate, activation)
    settings = product(tiles, depth, "stride_wf" if is_transposed else "stride_wd")
    yield f"first_linear {mixture} {phase}", ffn.first_linear, settings, tiles, wants_wgmma
    tiles, depth = ffn_launch.product_tiles(*facts)
    settings = product(tiles, depth, "stride_ww" if is_transposed else "stride_wd", GATHERS=False, HAS_WEIGHT=True)
    yield f"down {mixture} {phase}", ffn.row_product, settings, tiles, wants_wgmma
    if phase == "decode":
        return
    settings = product(tiles, depth, "stride_wd" if is_transposed else "stride_ww", HAS_WEIGHT=False, HAS_BIAS=False)
    for name, gathers in (("gradient of h", True), ("gradient of x", False)):
        yield f"{name} {mixture}", ffn.row_product, settings | {"GATHERS": gathers}, tiles, wants_wgmma
    tiles = ffn_launch.ACTIVATION_TILES
    settings = shape | dict.fromkeys(("HAS_G", "HAS_WEIGHTED", "HAS_DOTS"), True)
    settings |= {"BLOCK_M": tiles.rows, "BLOCK_F": tiles.columns}
    yield f"activation_gradient {mixture}", ffn.activation_gradient, settings, tiles, False
    tiles, depth = ffn_launch.gradient_tiles(dtype, is_large)
    settings = shape | {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.columns, "BLOCK_N": depth}
    for unit in ("stride_or", "stride_oc"):
        yield f"stack_gradient {mixture} {unit}", ffn.stack_gradient, settings | {unit: 1}, tiles, wants_wgmma
    tiles = ffn_launch.BIAS_TILES
    settings = shape | {"GATHERS": True, "HAS_WEIGHT": True, "BLOCK_W": tiles.columns, "BLOCK_N": tiles.rows}
    yield f"bias_gradient {mixture}", ffn.bias_gradient, settings, tiles, False


def stack_bytes(cubin: bytes, tmp_path: Path) -> int:
    """What registers have spilled to memory."""
    file = tmp_path / "program.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found and int(found[1]) > 0, usage
    return int(found[2])


def problems_of(what, program, settings, tiles, wants_wgmma, name, dtype, tmp_path, others=None):
    """What is wrong with a program on a target."""
    target, most_shared = TARGETS[name]
    stages = min(tiles.stages, sizes.MAX_HIP_STAGES) if target.backend == "hip" else tiles.stages
    kernel = compiled(program, dtype, target, settings, others, num_warps=tiles.warps, num_stages=stages)
    if kernel.metadata.shared > most_shared:
        yield f"{what}: {kernel.metadata.shared} bytes of shared memory, {most_shared} are there"
    if target.backend == "cuda" and (stack := stack_bytes(kernel.asm["cubin"], tmp_path)):
        yield f"{what}: {stack} bytes spilled"
    if target.backend == "hip" and (spilled := re.search(r"vgpr_spill_count: +([1-9]\d*)", kernel.asm["amdgcn"])):
        yield f"{what}: {spilled[1]} registers spilled"
    if name == "sm_90" and dtype != torch.float32 and wants_wgmma and "wgmma" not in kernel.asm["ptx"]:
        yield f"{what}: no wgmma"


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
    found = specialisations(dtype, is_thorough=is_thorough)
    problems = [problem for one in found for problem in problems_of(*one, name, dtype, tmp_path)]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_spill_is_noticed(tmp_path):
    settings = {"E": E, "K": K, "R": 16, "SEGMENTS": 8, "HAS_WEIGHT": True, "HAS_SOURCE": True}
    settings |= {"BLOCK_M": 64, "BLOCK_W": 128, "BLOCK_R": 32}
    kernel = compiled(sorted_rows.expand, torch.float32, TARGETS["sm_90"][0], settings, num_warps=4, num_stages=2)
    assert stack_bytes(kernel.asm["cubin"], tmp_path) > 0


def ffn_problems(mixtures, name, dtype, weight_dtype, tmp_path):
    """What is wrong with the programs for FFN experts."""
    is_large = name != "sm_80" and weight_dtype.itemsize == 2
    for mixture in mixtures:
        for phase in ROWS:
            for one in ffn_specialisations(mixture, phase, dtype, weight_dtype, is_large):
                is_gradient = one[1] in (ffn.stack_gradient, ffn.bias_gradient)
                yield from problems_of(*one, name, dtype, tmp_path, {"out" if is_gradient else "w": weight_dtype})


@pytest.mark.slow
def test_ffn_experts_neither_spill_nor_need_too_much_memory(tmp_path):
    problems = list(ffn_problems(["mixtral"], "sm_90", torch.bfloat16, torch.bfloat16, tmp_path))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=["bfloat16", "float16", "float32", "bfloat16-of-float32"],
)
def test_no_mixture_spills(name, dtype, weight_dtype, tmp_path):
    problems = list(ffn_problems(MIXTURES, name, dtype, weight_dtype, tmp_path))
    assert not problems, "\n".join(problems)
