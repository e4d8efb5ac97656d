"""The chunks of `segment`: wherever the workspace cuts the rows, the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, make_grad_out, make_index, make_inputs
from kernel_oracle import outputs_and_gradients

from peft_moe.kernels import DispatchPlan, lora_experts
from peft_moe.kernels.backends import segment


@pytest.mark.parametrize("max_rows", [1, 3, 32, 200])
def test_chunks_cover_every_row_once_and_in_order(max_rows: int) -> None:
    plan = DispatchPlan.from_index(make_index(CASES["hundred_tokens"]), 6)
    chunks = segment.cut(plan, max_rows)
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == 200 and all(sum(c.sizes) == c.stop - c.start <= max_rows for c in chunks)
    experts = [e for c in chunks for e, size in zip(c.experts, c.sizes) for _ in range(size)]
    assert experts == sorted(plan.top_k_index.flatten().tolist())


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float) -> None:
    monkeypatch.setattr(segment, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(segment, "MIN_CHUNK_ROWS", 7)
    case = CASES["hundred_tokens"]
    inputs, grad_out = make_inputs(case, dtype), make_grad_out(case, dtype)
    expected = outputs_and_gradients(inputs, make_index(case), case.scaling, grad_out)
    plan = DispatchPlan.from_index(make_index(case), case.num_experts)
    out = lora_experts(**inputs, plan=plan, scaling=case.scaling, backend="segment")
    found = [out.detach(), *torch.autograd.grad(out, list(inputs.values()), grad_out)]
    for name, tensor in zip(expected, found):
        assert (tensor.double() - expected[name]).norm() <= limit * expected[name].norm(), name


def test_linears_that_share_a_plan_share_its_chunks() -> None:
    plan = DispatchPlan.from_index(make_index(CASES["hundred_tokens"]), 6)
    assert segment.chunks_of(plan, 32) is segment.chunks_of(plan, 32)
