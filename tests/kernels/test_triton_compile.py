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
from peft_moe.kernels.triton.launch import ffn as ffn_launch  # noqa: E402
from peft_moe.kernels.triton.launch import pairs as pairs_launch  # noqa: E402
from peft_moe.kernels.triton.launch.sort import SORT_WARPS, sort_blocks  # noqa: E402
from peft_moe.kernels.triton.programs import dense, examples, ffn, pairs, sort, sorted_rows  # noqa: E402


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
    """The program as it is launched on contiguous tensors, widths multiples of 16; `others` have other dtypes."""
    types = POINTERS | dict.fromkeys(DATA, TYPES[dtype]) | {"out": TYPES[dtype], "scaling": "fp32"}
    types |= dict.fromkeys((*INTEGERS, *WIDTHS, *(f"stride_{name}" for name in STRIDES)), "i32")
    if program.__name__.startswith("weight_gradient"):
        types["out"] = "*fp32"
    types |= {name: TYPES[other] for name, other in (others or {}).items()}
    names = program.arg_names
    if "UPCAST" in names:
        settings = {**settings, **sizes.precision_of(dtype)}
    settings = {name: value for name, value in settings.items() if name in names}
    signature = {name: "constexpr" if name in settings else types[name] for name in names}
    aligned = [
        i for i, name in enumerate(names) if signature[name] != "constexpr" and name not in (*INTEGERS, "scaling")
    ]
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


# experts, experts per token, activation, whether there is a gate, biases, a transposed layout; phi and gpt-oss have
# them
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
    settings, _ = expand_settings(16, 8192, torch.float32, has_source=True)
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
