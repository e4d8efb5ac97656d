"""Run by `test_triton_interpreter.py` where Triton interprets: what the conformance cases are too small for."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import CASES, KernelCase, make_grad_out, make_index, make_inputs, plan_of
from kernel_oracle import outputs_and_gradients

from peft_moe.kernels import DispatchPlan, lora_experts
from peft_moe.kernels.backends import triton as backend
from peft_moe.kernels.call import Call
from peft_moe.kernels.triton import is_interpreted, launch_lora, rows
from peft_moe.kernels.triton import tiles as sizes
from peft_moe.kernels.triton.programs import dense, examples, pairs, shared, sort, sorted_rows


assert is_interpreted(), "TRITON_INTERPRET=1 has to be set before triton is imported"

BY_PATH = {
    "dense": {
        "several_tiles": KernelCase("segments longer than a tile", 300, 40, 56, num_experts=3, rank=16, top_k=2),
        "several_column_blocks": KernelCase("experts cut by the edge of a tile", 70, 72, 136, num_experts=4, rank=50),
        "many_experts": KernelCase("more segments than rows of one slot", 24, 24, 24, num_experts=17, rank=4, top_k=3),
        "skewed": KernelCase("one expert has nearly all", 130, 40, 40, top_k=1, forced=[[2]] * 129 + [[0]]),
        "short_examples": KernelCase("examples shorter than a tile", 45, 24, 24, tokens_per_example=3),
    },
    "sorted": {
        "several_rank_blocks": KernelCase(
            "a rank above the widest tile", 70, 72, 136, num_experts=3, rank=130, top_k=3
        ),
        "many_wide_experts": KernelCase(
            "more experts than a dense product pays for", 40, 24, 24, num_experts=9, rank=33
        ),
    },
    "examples": {
        "universal": KernelCase(
            "tiles end where examples do", 210, 40, 56, 4, 6, tokens_per_example=70, forced=[[1, 3]] * 3
        ),
        "examples_of_wide_rank": KernelCase(
            "columns of a slot in two tiles", 48, 40, 136, rank=65, tokens_per_example=24
        ),
    },
    "decode": {
        "decode_of_wide_rank": KernelCase(
            "several rank tiles of one pair", 1, 520, 136, num_experts=3, rank=37, top_k=3
        ),
    },
}
LARGE = {name: case for cases in BY_PATH.values() for name, case in cases.items()}
PATHS = {name: path for path, cases in BY_PATH.items() for name in cases}
LIMITS = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]


def path_taken(case: KernelCase) -> str:
    return backend.path_of(case.num_tokens, case.tokens_per_example, case.num_experts, case.top_k, case.rank)


def results(case: KernelCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, dtype)
    plan = plan_of(case)
    out = lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="triton")
    grads = torch.autograd.grad(out, list(inputs.values()), make_grad_out(case, dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads))}


def worst_error(case: KernelCase, dtype: torch.dtype = torch.float32) -> float:
    inputs, grad_out = make_inputs(case, dtype), make_grad_out(case, dtype)
    expected = outputs_and_gradients(case, inputs, grad_out)
    found = results(case, dtype)
    errors = [
        (found[name].double() - exact).norm() / exact.norm().clamp_min(1e-30) for name, exact in expected.items()
    ]
    return float(torch.stack(errors).max())  # Python's own `max` passes over NaN


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
def test_large_cases(name, dtype, limit, poison):
    assert path_taken(LARGE[name]) == PATHS[name]
    assert worst_error(LARGE[name], dtype) <= limit


@pytest.mark.parametrize("name", ["several_tiles", "skewed", "short_examples"])
def test_large_cases_sorted(name, monkeypatch, poison):
    monkeypatch.setattr(backend, "path_of", lambda *shape: "sorted")
    assert worst_error(LARGE[name]) <= 1e-5


def test_the_values_of_experts_that_were_not_chosen_may_overflow(poison):
    """A dense product computes them, and infinity times 0 is not a number."""
    case = dataclasses.replace(LARGE["several_tiles"], forced=[[0, 1]] * 300)
    inputs = make_inputs(case, torch.float16)
    plan = plan_of(case)
    with torch.no_grad():
        inputs["A"][2] = 6e4
    out = lora_experts(**inputs, plan=plan, backend="triton")
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert path_taken(case) == "dense" and (inputs["hidden_states"] @ inputs["A"][2].T).isinf().any()
    assert all(tensor.isfinite().all() for tensor in (out, *grads))


SMALL = ["top_1", "no_tokens", "empty_experts", "same_expert_twice", "odd_sizes", "strided"]


@pytest.mark.parametrize("name", [*SMALL, "by_example", "by_example_forced", "plain_lora"])
@pytest.mark.parametrize("path", ["examples", "dense", "sorted"])
def test_every_path_is_right_for_every_shape(name, path, monkeypatch, poison):
    assert path_taken(CASES[name]) == "decode"
    monkeypatch.setattr(backend, "path_of", lambda *shape: path)
    assert worst_error(CASES[name]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "path"),
    [("several_tiles", "sorted"), ("skewed", "sorted"), ("skewed", "dense"), ("universal", "examples")],
)
def test_split_sums_add_up(name, path, monkeypatch, poison):
    monkeypatch.setattr(backend, "path_of", lambda *shape: path)
    monkeypatch.setattr(sizes, "ROWS_PER_SPLIT", 8)
    seen = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: seen.append(size) or empty(*size, **more))
    assert worst_error(LARGE[name]) <= 1e-5
    assert any(len(size) == 4 and size[0] > 1 for size in seen)


def sorted_by_torch(index: torch.Tensor, tokens_per_example: int, num_experts: int) -> list[torch.Tensor]:
    index = index.repeat_interleave(tokens_per_example, 0)
    segment = (index + num_experts * torch.arange(index.shape[1])).t().reshape(-1)
    token_of_row = segment.argsort(stable=True) % max(len(index), 1)
    return [token_of_row, segment.bincount(minlength=num_experts * index.shape[1]).cumsum(0)]


@pytest.mark.parametrize(
    ("num_examples", "tokens_per_example", "num_experts", "top_k"),
    [(0, 1, 3, 2), (1, 1, 1, 1), (40, 1, 5, 2), (7, 3, 5, 2), (9, 1, 70, 3), (5000, 1, 8, 1), (300, 1, 100, 2)],
)
def test_the_sort_is_that_of_torch(num_examples, tokens_per_example, num_experts, top_k, monkeypatch, poison):
    if num_experts == 100:
        monkeypatch.setattr(rows, "SORT_TILE", 256)
    index = torch.randint(num_experts, (num_examples, top_k), generator=torch.Generator().manual_seed(0))
    found = rows.run_sort(index, tokens_per_example, num_experts)
    expected = sorted_by_torch(index, tokens_per_example, num_experts)
    assert all(torch.equal(f.long(), e) for f, e in zip(found, expected))


def test_a_sort_serves_all_linears_and_backward(monkeypatch):
    calls = []
    right = rows.run_sort
    monkeypatch.setattr(rows, "run_sort", lambda *arguments: calls.append(1) or right(*arguments))
    case = LARGE["many_wide_experts"]
    inputs, plan = make_inputs(case, torch.float32), plan_of(case)
    for _ in range(2):
        lora_experts(**inputs, plan=plan, backend="triton").sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["top_2", "one_example", "universal", "several_tiles"])
def test_nothing_is_sorted_where_nothing_has_to_be(name, monkeypatch):
    case = {**LARGE, **CASES}[name]
    monkeypatch.setattr(rows, "run_sort", None)
    results(case, torch.float32)


@pytest.mark.parametrize("name", ["several_tiles", "many_wide_experts", "universal", "top_2"])
def test_repeats_are_equal_to_the_bit(name):
    case = {**LARGE, **CASES}[name]
    first, second = results(case, torch.float32), results(case, torch.float32)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("top_2", "decode"),
        ("by_example", "examples"),
        ("top_2", "dense"),
        ("by_example", "dense"),
        ("top_2", "sorted"),
        ("by_example", "sorted"),
    ],
)
def test_compiled_graphs_hold_the_op_and_its_gradients(name, path, monkeypatch):
    monkeypatch.setattr(backend, "path_of", lambda *shape: path)
    case = CASES[name]
    inputs, index, grad_out = make_inputs(case, torch.float32), make_index(case), make_grad_out(case, torch.float32)

    def layer(*tensors):
        plan = DispatchPlan.from_index(index, case.num_experts, tokens_per_example=case.tokens_per_example)
        # base_out comes from a layer, so that it may be written to
        given = dict(zip(inputs, tensors))
        given["base_out"] = given["base_out"] * 1.0
        return lora_experts(**given, plan=plan, scaling=case.scaling, backend="triton", inplace=True)

    tensors = list(inputs.values())
    torch._dynamo.reset()
    out, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors), layer(*tensors)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, grad_out), torch.autograd.grad(expected, tensors, grad_out)
    )


def test_a_compiled_decode_step_needs_no_gradient():
    case = CASES["top_2"]
    inputs, index = make_inputs(case, torch.float32), make_index(case)

    def layer():
        plan = DispatchPlan.from_index(index, case.num_experts)
        return lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="triton")

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(), layer())


@pytest.mark.parametrize("path", ["decode", "dense", "sorted"])
def test_ops_obey_the_rules_of_torch_library(path):
    case = CASES["top_2"]
    inputs = make_inputs(case, torch.float32)
    plan = plan_of(case)
    given = Call(*inputs.values(), plan, case.scaling, inplace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "path_of", lambda *shape: path)
        torch.library.opcheck(
            backend.lora_op,
            backend.tensors_of(given, backend.rows_for(given)),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_sort_obeys_the_rules_of_torch_library():
    from peft_moe.kernels.triton.rows import sort_op

    torch.library.opcheck(
        sort_op, (torch.tensor([[0, 2], [1, 2]]), 2, 3), test_utils=("test_schema", "test_faketensor")
    )


@triton.jit
def _multiply(x, y, out, UPCAST: tl.constexpr):
    index = tl.arange(0, 16)
    where = index[:, None] * 16 + index[None, :]
    tl.store(out + where, shared.product(tl.load(x + where), tl.load(y + where), UPCAST, "ieee"))


@triton.jit
def _round(x, out, UPCAST: tl.constexpr):
    index = tl.arange(0, 1024)
    tl.store(out + index, shared.narrow(tl.load(x + index), tl.bfloat16, UPCAST))


def test_bfloat16_products_are_right_when_they_are_computed_in_float32():
    x, y, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    expected = x.float() @ y.float()
    _multiply[(1,)](x, y, out, UPCAST=True)
    torch.testing.assert_close(out, expected)
    _multiply[(1,)](x, y, out, UPCAST=False)
    error = float((out - expected).norm() / expected.norm())
    assert not error < 1e-2, "the interpreter multiplies bfloat16 correctly by now: UPCAST is no longer needed"


def test_bfloat16_is_rounded_to_the_nearest():
    x, out = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
    _round[(1,)](x, out, UPCAST=True)
    assert torch.equal(out, x.bfloat16())


CHANGES = {
    sorted_rows: {
        "the weight of another slot": ("* K + slot, mask=is_row", "* K, mask=is_row"),
        "no scaling": ("tl.float32) + scaling", "tl.float32) + 1.0"),
        "segments end a row early": ("is_row = rows < stop", "is_row = rows < stop - 1"),
        "a slot is left out": ("for slot in tl.static_range(0, K)", "for slot in tl.static_range(0, K - 1)"),
        "always the first expert": ("w + (segment % E)", "w + 0 * (segment % E)"),
        "the output of a neighbour": ("tl.store(out + token[:, None] * W", "tl.store(out + (token[:, None] ^ 1) * W"),
        "the rest of the columns": ("range(0, D, BLOCK_D)", "range(0, D - BLOCK_D, BLOCK_D)"),
    },
    examples: {
        "the weight of another slot": ("weight + choice, mask=is_column", "weight + choice // K * K, mask=is_column"),
        "the weight of another slot in gradients": ("tl.load(weight + choice)", "tl.load(weight + (choice // K) * K)"),
        "no scaling": ("tl.float32) + scaling", "tl.float32) + 1.0"),
        "no scaling of gradients": ("factor = scaling * ", "factor = "),
        "examples end a row early": ("place < tokens_per_example", "place < tokens_per_example - 1"),
        "sums end a row early": ("is_row = token < stop", "is_row = token < stop - 1"),
        "a slot is left out": ("range(0, K * R, BLOCK_C)", "range(0, K * R - BLOCK_C, BLOCK_C)"),
        "a choice is left out": ("range(0, num_choices)", "range(0, num_choices - 1)"),
        "a slot gets the dot product of another": ("column // R == slot", "column // R == K - 1 - slot"),
        "always the first expert": (
            "expert = tl.load(index + example * K",
            "expert = 0 * tl.load(index + example * K",
        ),
        "the gradient of a neighbour": ("== expert\n", "== expert ^ 1\n"),
        "a split takes the turn of another": ("turn = split", "turn = 0 * split"),
        "the rest of the columns": ("range(0, D, BLOCK_D)", "range(0, D - BLOCK_D, BLOCK_D)"),
    },
    dense: {
        "the weight of another slot": ("weight + choice + slot", "weight + choice"),
        "no scaling": ("tl.float32) + scaling", "tl.float32) + 1.0"),
        "the values of experts that were not chosen": ("tl.where(is_it, value, 0.0)", "value"),
        "an expert chosen twice counts once": (
            "factor += tl.where(is_it, value, 0.0)",
            "factor = tl.where(is_it, value, factor)",
        ),
        "a slot gets the dot product of another": (
            "expert = tl.load(index + choice + slot",
            "expert = tl.load(index + choice + K - 1 - slot",
        ),
        "the choices of a neighbour": ("(token // tokens_per_example) * K", "(token // tokens_per_example ^ 1) * K"),
        "tokens end a row early": ("is_row = token < num_tokens", "is_row = token < num_tokens - 1"),
        "an expert is left out": ("range(0, E * R, BLOCK_C)", "range(0, E * R - BLOCK_C, BLOCK_C)"),
        "a split takes the turn of another": ("range(split * BLOCK_N", "range(0 * split * BLOCK_N"),
        "the rest of the columns": ("range(0, D, BLOCK_D)", "range(0, D - BLOCK_D, BLOCK_D)"),
    },
    pairs: {
        "the weight of another slot": ("tl.load(weight + choice)", "tl.load(weight + choice - slot)"),
        "no scaling": ("factor = scaling", "factor = 1.0"),
        "a slot is left out": ("for slot in range(0, K)", "for slot in range(0, K - 1)"),
        "always the first slot": ("* K + pair % K", "* K"),
        "the last ranks": ("is_rank = rank < R", "is_rank = rank < R - 1"),
        "the rest of the columns": ("range(0, D, BLOCK_D)", "range(0, D - BLOCK_D, BLOCK_D)"),
        "the weight of a neighbour": ("choice = (token // tokens_per_example)", "choice = (token % 2)"),
    },
}
SORT_CHANGES = {
    "segments end a row early": ("slot * E + experts, next_row", "slot * E + experts, next_row - 1"),
    "an expert begins too early": ("choice[:, None] < experts[None, :]", "choice[:, None] < experts[None, :] - 1"),
    "steps overwrite each other": ("next_row += tl.sum(is_mine, 0)", "next_row += 0"),
    "the choices of another slot": ("* K + slot, mask", "* K, mask"),
}
# small shapes in which each change shows: two steps along the width, a remainder of the columns, several splits
SHOWS_IN = {
    sorted_rows: ("sorted", dataclasses.replace(CASES["top_2"], num_tokens=10, in_features=136)),
    examples: ("examples", KernelCase("", 36, 136, 20, 4, 10, tokens_per_example=18, forced=[[1, 3], [2, 3]])),
    dense: ("dense", KernelCase("", 36, 136, 20, 4, 50, forced=[[1, 3], [2, 3], [1, 1]] * 12)),
    pairs: ("decode", dataclasses.replace(CASES["by_example"], num_tokens=4, in_features=520, tokens_per_example=2)),
}


def changed(programs: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """Programs with one passage replaced."""
    source = Path(programs.__file__).read_text()
    assert right in source
    file = folder / "changed.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{programs.__package__}.changed", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def error_of(monkeypatch):
    """The worst error of a family of programs on its shape."""

    def worst(family: ModuleType) -> float:
        path, case = SHOWS_IN[family]
        monkeypatch.setattr(backend, "path_of", lambda *shape: path)
        monkeypatch.setattr(sizes, "ROWS_PER_SPLIT", 8)
        return worst_error(case)

    return worst


def name_of(value: object) -> str:
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else str(value)


@pytest.mark.parametrize("family", SHOWS_IN, ids=name_of)
def test_the_unchanged_programs_are_right(family, error_of):
    assert error_of(family) <= 1e-5


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in CHANGES for name in CHANGES[family]], ids=name_of
)
def test_a_wrong_program_is_noticed(family, name, tmp_path, monkeypatch, error_of):
    wrong, path = changed(family, *CHANGES[family][name], tmp_path), SHOWS_IN[family][0]
    programs = [one and getattr(wrong, one.fn.__name__) for one in launch_lora.PROGRAMS[path]]
    monkeypatch.setitem(launch_lora.PROGRAMS, path, launch_lora.Programs(*programs))
    assert not error_of(family) <= 1e-2


@pytest.mark.parametrize("name", [None, *SORT_CHANGES])
def test_a_wrong_sort_is_noticed(name, tmp_path, monkeypatch, poison):
    if name is not None:
        wrong = changed(sort, *SORT_CHANGES[name], tmp_path)
        monkeypatch.setattr(sort, "sort_by_expert", wrong.sort_by_expert)
    monkeypatch.setattr(rows, "SORT_TILE", 64)
    index = torch.randint(5, (75, 2), generator=torch.Generator().manual_seed(0))
    found, expected = rows.run_sort(index, 2, 5), sorted_by_torch(index, 2, 5)
    assert all(torch.equal(f.long(), e) for f, e in zip(found, expected)) == (name is None)
