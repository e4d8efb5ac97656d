"""The oracle notices every mistake that it is there to notice: a change of any input changes what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import CASES, make_grad_out, make_index, make_inputs
from kernel_oracle import outputs_and_gradients

from peft_moe.kernels import DispatchPlan, lora_experts


CASE = CASES["top_2"]


def distance(**mistake: object) -> float:
    """How far the op with a mistake is from the oracle without it."""
    inputs = make_inputs(CASE, torch.float64)
    expected = outputs_and_gradients(inputs, make_index(CASE), CASE.scaling, make_grad_out(CASE, torch.float64))["out"]
    index = mistake.pop("index", make_index(CASE))
    plan = DispatchPlan.from_index(index, CASE.num_experts)
    found = lora_experts(**{**inputs, "plan": plan, "scaling": CASE.scaling, "backend": "eager", **mistake})
    return float((found - expected).norm() / expected.norm())


def test_no_mistake_is_no_distance() -> None:
    assert distance() < 1e-14


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"scaling": 1.0}, id="missing_scale"),
        pytest.param({"top_k_weights": None}, id="missing_weights"),
        pytest.param(
            {"top_k_weights": make_inputs(CASE, torch.float64)["top_k_weights"].flip(1)}, id="swapped_weights"
        ),
        pytest.param({"index": (make_index(CASE) + 1) % CASE.num_experts}, id="shifted_experts"),
        pytest.param({"index": make_index(CASE)[:, :1].expand(-1, 2)}, id="first_expert_twice"),
        pytest.param({"index": torch.cat([make_index(CASE)[1:], make_index(CASE)[:1]])}, id="off_by_one_token"),
    ],
)
def test_oracle_notices(mistake: dict[str, object]) -> None:
    assert distance(**mistake) > 1e-2


def test_gradients_of_the_oracle_are_not_all_alike() -> None:
    inputs = make_inputs(dataclasses.replace(CASE, num_tokens=4), torch.float64)
    case = dataclasses.replace(CASE, num_tokens=4)
    found = outputs_and_gradients(inputs, make_index(case), case.scaling, make_grad_out(case, torch.float64))
    assert all(float(found[name].norm()) > 0.1 for name in inputs)
