"""Every backend, found and not listed, computes the op and its gradients like the oracle, which notices mistakes."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from kernel_cases import CASES, KernelCase, make_grad_out, make_index, make_inputs, plan_of
from kernel_oracle import outputs_and_gradients

from peft_moe.kernels import BACKENDS, Case, DispatchPlan, lora_experts


LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in LIMITS]
SMALL = dataclasses.replace(CASES["top_2"], num_tokens=5, in_features=8, out_features=8, num_experts=3)


def skip_unless_supported(backend: str, case: KernelCase, dtype: torch.dtype, device: str = "cpu") -> None:
    top_k = case.top_k if case.is_dispatched else 0
    sizes = (case.num_tokens, case.in_features, case.out_features, case.num_experts, case.rank, top_k)
    if reason := BACKENDS[backend].refusal(Case(*sizes, dtype, device, case.tokens_per_example)):
        pytest.skip(reason)


def call(backend: str, case: KernelCase, inputs: dict[str, torch.Tensor], **changes: object) -> torch.Tensor:
    plan = None
    if case.is_dispatched:
        plan = plan_of(case)
    return lora_experts(**{**inputs, "plan": plan, "scaling": case.scaling, "backend": backend, **changes})


@cache
def oracle_says(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    case = CASES[name]
    inputs, grad_out = make_inputs(case, dtype), make_grad_out(case, dtype)
    return outputs_and_gradients(case, inputs, grad_out)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    size = 1.0 if expected.numel() == 0 or not expected.any() else expected.norm()
    error = float((found.double() - expected).norm() / size)
    return math.inf if math.isnan(error) else error  # `max` passes over NaN


def gradients(out: torch.Tensor, inputs: dict[str, torch.Tensor], grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad_out)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_backend_agrees_with_the_oracle(backend: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    skip_unless_supported(backend, case, dtype)
    inputs, grad_out, expected = make_inputs(case, dtype), make_grad_out(case, dtype), oracle_says(name, dtype)
    out = call(backend, case, inputs)
    found = {"out": out, **gradients(out, inputs, grad_out)}
    errors = {key: relative_error(found[key].detach(), expected[key]) for key in expected}
    assert out.dtype == dtype and max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["top_1", "top_2", "same_expert_twice", "by_example", "plain_lora"])
def test_no_weights_mean_that_every_weight_is_one(backend: str, name: str) -> None:
    case = CASES[name]
    skip_unless_supported(backend, case, torch.float32)
    inputs, grad_out = make_inputs(case, torch.float32), make_grad_out(case, torch.float32)
    inputs["top_k_weights"] = torch.ones_like(inputs["top_k_weights"]).requires_grad_()
    expected = outputs_and_gradients(case, inputs, grad_out)
    out = call(backend, case, inputs, top_k_weights=None)
    without_weights = {key: value for key, value in inputs.items() if key != "top_k_weights"}
    found = {"out": out, **gradients(out, without_weights, grad_out)}
    assert max(relative_error(found[key].detach(), expected[key]) for key in found) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["top_1", "top_2", "by_example", "plain_lora"])
def test_writing_in_place_changes_no_number(backend: str, name: str) -> None:
    case = CASES[name]
    skip_unless_supported(backend, case, torch.float32)
    inputs, grad_out = make_inputs(case, torch.float32), make_grad_out(case, torch.float32)
    out = call(backend, case, inputs)
    fresh = inputs["base_out"] * 1.0
    written = call(backend, case, inputs, base_out=fresh, inplace=True)
    assert written.data_ptr() == fresh.data_ptr()
    torch.testing.assert_close(written, out)
    torch.testing.assert_close(gradients(written, inputs, grad_out), gradients(out, inputs, grad_out))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["top_1", "plain_lora"])
def test_base_out_is_left_alone_unless_asked(backend: str, name: str) -> None:
    skip_unless_supported(backend, CASES[name], torch.float32)
    inputs = make_inputs(CASES[name], torch.float32)
    before = inputs["base_out"].detach().clone()
    call(backend, CASES[name], inputs)
    assert torch.equal(inputs["base_out"], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["top_2", "by_example", "plain_lora"])
@pytest.mark.parametrize("wanted", ["hidden_states", "base_out", "A", "B", "top_k_weights"])
def test_one_gradient_can_be_wanted_without_the_others(backend: str, name: str, wanted: str) -> None:
    case = CASES[name]
    skip_unless_supported(backend, case, torch.float32)
    inputs, grad_out = make_inputs(case, torch.float32), make_grad_out(case, torch.float32)
    expected = gradients(call(backend, case, inputs), inputs, grad_out)[wanted]
    alone = {key: value.detach().requires_grad_(key == wanted) for key, value in inputs.items()}
    (found,) = torch.autograd.grad(call(backend, case, alone), alone[wanted], grad_out)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graph_is_made_where_no_gradient_is_wanted(backend: str) -> None:
    skip_unless_supported(backend, CASES["top_2"], torch.float32)
    inputs = make_inputs(CASES["top_2"], torch.float32)
    with torch.no_grad():
        without = call(backend, CASES["top_2"], inputs)
    assert not without.requires_grad
    torch.testing.assert_close(without, call(backend, CASES["top_2"], inputs).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["small_top_2", "same_expert_twice", "plain_lora"])
def test_gradcheck(backend: str, name: str) -> None:
    case = SMALL if name == "small_top_2" else dataclasses.replace(CASES[name], num_tokens=3, rank=2)
    case = dataclasses.replace(case, forced=[[1, 1]] * 3 if case.forced else None)
    skip_unless_supported(backend, case, torch.float64)
    inputs = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(backend, case, dict(zip(inputs, tensors))), tuple(inputs.values()), fast_mode=True
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_double_backward_raises(backend: str) -> None:
    name = "plain_lora" if backend == "plain" else "top_2"
    skip_unless_supported(backend, CASES[name], torch.float32)
    inputs = make_inputs(CASES[name], torch.float32)
    out = call(backend, CASES[name], inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["empty_experts", "odd_sizes", "hundred_tokens", "by_example_forced", "plain_lora", "no_tokens"]
)
def test_no_element_is_left_unwritten(backend: str, name: str, poison: None) -> None:
    skip_unless_supported(backend, CASES[name], torch.float32)
    inputs = make_inputs(CASES[name], torch.float32)
    out = call(backend, CASES[name], inputs)
    found = [out, *gradients(out, inputs, make_grad_out(CASES[name], torch.float32)).values()]
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_kept(backend: str) -> None:
    case = dataclasses.replace(CASES["top_2"], num_tokens=6)
    skip_unless_supported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32)
    deep = inputs | {name: inputs[name].view(2, 3, -1) for name in ("hidden_states", "base_out")}
    out = call(backend, case, deep)
    assert out.shape == (2, 3, case.out_features)
    torch.testing.assert_close(out.flatten(0, 1), call(backend, case, inputs))
    grad_out = make_grad_out(case, torch.float32)
    torch.testing.assert_close(
        gradients(out, inputs, grad_out.view_as(out)), gradients(call(backend, case, inputs), inputs, grad_out)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_base_gets_a_narrow_result_from_wide_experts(backend: str) -> None:
    case = CASES["top_2"]
    skip_unless_supported(backend, case, torch.float32)
    inputs = make_inputs(case, torch.float32)
    narrow = inputs["base_out"].detach().bfloat16().requires_grad_()
    out = call(backend, case, inputs, base_out=narrow, inplace=True)
    out.sum().backward()
    wide = call(backend, case, inputs, base_out=narrow.detach().float())
    assert out.dtype == narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, wide.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    case = CASES["top_2"]
    skip_unless_supported(backend, case, torch.float32)
    inputs, grad_out = make_inputs(case, torch.float32), make_grad_out(case, torch.float32)
    out = call(backend, case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(backend, case, inputs)
        inside_gradients = gradients(inside, inputs, grad_out)
    torch.testing.assert_close(inside, out, rtol=0, atol=0)
    if backend != "eager":  # the backward of eager is torch's own, which follows autocast where backward is called
        torch.testing.assert_close(inside_gradients, gradients(out, inputs, grad_out), rtol=0, atol=0)


CASE = CASES["top_2"]


def distance(**mistake: object) -> float:
    """How far the op with a mistake is from the oracle without it."""
    inputs = make_inputs(CASE, torch.float64)
    expected = outputs_and_gradients(CASE, inputs, make_grad_out(CASE, torch.float64))["out"]
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
    case = dataclasses.replace(CASE, num_tokens=4)
    inputs = make_inputs(case, torch.float64)
    found = outputs_and_gradients(case, inputs, make_grad_out(case, torch.float64))
    assert all(float(found[name].norm()) > 0.1 for name in inputs)
