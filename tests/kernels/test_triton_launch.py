"""Triton programs start on the device of their tensors, which need not be the current one."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, make_index, make_inputs

from peft_moe.kernels import DispatchPlan, lora_experts
from peft_moe.kernels.triton.tiles import Tiles, launch


def test_a_program_starts_on_the_device_of_its_tensors_with_its_arguments_in_order(monkeypatch):
    events, tensor = [], torch.empty(1)

    class Program:
        arg_names = ("x", "K")

        def __getitem__(self, grid):
            return lambda *given, **options: events.append((grid, given, options))

    class Device:
        def __init__(self, on):
            assert on is tensor

        def __enter__(self):
            events.append("there")

        def __exit__(self, *error):
            events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    launch(Program(), (3,), Tiles(1, 1, 4, 2), tensor, {"K": 2, "unasked": None, "x": tensor})
    assert events == ["there", ((3,), (tensor, 2), {"num_warps": 4, "num_stages": 2}), "left"]


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
