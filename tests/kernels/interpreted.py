"""Run by `test_triton_interpreter.py` in a process whose Triton interprets: what the conformance cases are too small for."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import CASES, KernelCase, make_grad_out, make_index, make_inputs
from kernel_oracle import outputs_and_gradients

from peft_moe.kernels import DispatchPlan, lora_experts
from peft_moe.kernels.triton import is_interpreted, launch, programs


assert is_interpreted(), "TRITON_INTERPRET=1 has to be set before triton is imported"

LARGE = {
    "several_tiles": KernelCase("segments longer than a tile", 300, 40, 56, num_experts=3, rank=16, top_k=2),
    "several_rank_blocks": KernelCase("a rank above the widest tile", 70, 72, 136, num_experts=3, rank=130, top_k=3),
    "many_experts": KernelCase("more segments than rows", 20, 24, 24, num_experts=17, rank=4, top_k=3),
    "skewed": KernelCase("one expert has nearly all", 130, 40, 40, top_k=1, forced=[[2]] * 129 + [[0]]),
}


def results(case: KernelCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, dtype)
    plan = DispatchPlan.from_index(make_index(case), case.num_experts, tokens_per_example=case.tokens_per_example)
    out = lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="triton")
    grads = torch.autograd.grad(out, list(inputs.values()), make_grad_out(case, dtype))
    return {"out": out.detach(), **dict(zip(inputs, grads))}


def worst_error(case: KernelCase, dtype: torch.dtype = torch.float32) -> float:
    inputs, grad_out = make_inputs(case, dtype), make_grad_out(case, dtype)
    expected = outputs_and_gradients(inputs, make_index(case), case.scaling, grad_out, case.tokens_per_example)
    found = results(case, dtype)
    return max(float((found[n].double() - e).norm() / e.norm().clamp_min(1e-30)) for n, e in expected.items())


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_large_cases(name, dtype, limit):
    assert worst_error(LARGE[name], dtype) <= limit


@pytest.mark.parametrize("name", ["several_tiles", "skewed"])
def test_split_sums_add_up(name, monkeypatch):
    monkeypatch.setattr(launch, "ROWS_PER_SPLIT", 8)
    seen = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: seen.append(size) or empty(*size, **more))
    assert worst_error(LARGE[name]) <= 1e-5
    assert any(len(size) == 4 and size[0] > 1 for size in seen)


@pytest.mark.parametrize("name", ["several_tiles", "top_2"])
def test_repeats_are_equal_to_the_bit(name):
    case = {**LARGE, **CASES}[name]
    first, second = results(case, torch.float32), results(case, torch.float32)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["top_1", "top_2", "by_example"])
def test_compiled_graphs_hold_the_op_and_its_gradients(name):
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


def test_ops_obey_the_rules_of_torch_library():
    from peft_moe.kernels.backends.triton import lora_op
    from peft_moe.kernels.triton.rows import rows_of

    case = CASES["top_2"]
    inputs = make_inputs(case, torch.float32)
    rows = rows_of(DispatchPlan.from_index(make_index(case), case.num_experts))
    torch.library.opcheck(
        lora_op,
        (*inputs.values(), rows.token_of_row, rows.segment_end, rows.top_k, case.scaling),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@triton.jit
def _multiply(x, y, out, UPCAST: tl.constexpr):
    index = tl.arange(0, 16)
    where = index[:, None] * 16 + index[None, :]
    tl.store(out + where, programs.product(tl.load(x + where), tl.load(y + where), UPCAST, "ieee"))


@triton.jit
def _round(x, out, UPCAST: tl.constexpr):
    index = tl.arange(0, 1024)
    tl.store(out + index, programs.narrow(tl.load(x + index), tl.bfloat16, UPCAST))


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


MUTATIONS = {
    "the weight of another slot": ("weight + token * K + slot", "weight + token * K"),
    "no scaling": ("tl.float32) + scaling", "tl.float32) + 1.0"),
    "segments end a row early": ("is_row = rows < stop", "is_row = rows < stop - 1"),
    "a slot is left out": ("for slot in tl.static_range(0, K)", "for slot in tl.static_range(0, K - 1)"),
    "always the first expert": ("w + (segment % E)", "w + 0 * (segment % E)"),
    "the output of a neighbour": ("tl.store(out + token[:, None] * W", "tl.store(out + (token[:, None] ^ 1) * W"),
    "the rest of the columns": ("for first in range(0, D, BLOCK_D)", "for first in range(0, D - BLOCK_D, BLOCK_D)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_program_is_noticed(name, tmp_path, monkeypatch):
    right, wrong = MUTATIONS[name]
    source = Path(programs.__file__).read_text()
    assert right in source
    file = tmp_path / "mutated.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutated", file)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    case = dataclasses.replace(CASES["top_2"], num_tokens=10, in_features=136)
    assert worst_error(case) <= 1e-5
    monkeypatch.setattr(launch, "programs", mutated)
    assert not worst_error(case) <= 1e-2
