"""Triton programs start on the device of their tensors, which need not be the current one."""

from __future__ import annotations

import inspect

import pytest
import torch
from kernel_cases import CASES, make_index, make_inputs

from peft_moe.kernels import DispatchPlan, lora_experts


pytest.importorskip("triton", reason="the launchers import the package triton")

from peft_moe.kernels.triton.launch import dense, examples, ffn, pairs, sort, sorted_rows  # noqa: E402


LAUNCHERS = [
    pytest.param(launch, id=f"{module.__name__.rpartition('.')[2]}-{name}")
    for module in (dense, examples, ffn, pairs, sort, sorted_rows)
    for name, launch in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("run_")
]


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_launcher_goes_to_the_device_of_its_tensors_first(launch, monkeypatch):
    class Reached(Exception):
        pass

    def device_of(tensor):
        assert tensor is first
        raise Reached

    first = torch.empty(1)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with pytest.raises(Reached):
        launch(first)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("name", ["one_token", "hundred_tokens", "by_example"])
def test_tensors_on_the_second_device(name):
    case, device = CASES[name], torch.device("cuda", 1)
    inputs = {
        key: tensor.detach().to(device).requires_grad_() for key, tensor in make_inputs(case, torch.float32).items()
    }
    plan = DispatchPlan.from_index(
        make_index(case).to(device), case.num_experts, tokens_per_example=case.tokens_per_example
    )

    def results(backend: str) -> list[torch.Tensor]:
        out = lora_experts(**inputs, plan=plan, scaling=case.scaling, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), list(inputs.values()))]

    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(results("triton"), results("eager"), rtol=1e-4, atol=1e-4)
