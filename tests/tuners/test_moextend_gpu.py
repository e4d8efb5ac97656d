"""MoExtend on a CUDA device: a base model in bfloat16, new experts that train in float32."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from test_moextend_families import BY_NAME, choices_of, config_for, gradients_of, logits_of, shaken
from torch import nn

from peft_moe import get_aux_loss
from tiny_moe import NUM_EXPERTS, moe_batch


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

DEVICE = "cuda"
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3"]


def batch_on_device() -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in moe_batch(4, 16).items()}


def extended(name: str, dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    """Two new experts per layer, computed by grouped matrix products, which the device has for bfloat16."""
    family = BY_NAME[name]
    base = family.build().to(device, dtype)
    model = get_peft_model(base, config_for(family, num_new_experts=2, router_aux_loss_coef=0.01)).eval()
    shaken(model.cpu(), 0.1)  # the noise is that of the CPU
    model.to(device)
    model.base_model.model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_float32_experts_of_a_bfloat16_base_and_moves_nothing_else(name):
    model, batch = extended(name, torch.bfloat16).train(), batch_on_device()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        assert get_aux_loss(model).isfinite()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trained.values())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved and moved <= set(trained)
    assert {"moextend_gate", "moextend_experts"} == {
        part for key in moved for part in key.split(".") if part.startswith("moextend_")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_works_in_bfloat16(name):
    model, batch = extended(name, torch.bfloat16), batch_on_device()
    assert any((chosen >= NUM_EXPERTS).any() for chosen in choices_of(model, **batch))
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found.shape == (4, 24) and torch.equal(found[:, :16], prompt["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=found, attention_mask=torch.ones_like(found)).logits[:, 15:-1]
    chosen = logits.gather(-1, found[:, 16:, None]).squeeze(-1)
    # with a cache sums have another order, so that the best two may change places
    assert (logits.amax(dim=-1) - chosen).max() < 0.25


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_in_float32_are_those_of_the_cpu(name):
    here, there = extended(name, torch.float32), extended(name, torch.float32, "cpu")
    batch = moe_batch(4, 16)
    expected = logits_of(there, **batch)
    torch.testing.assert_close(logits_of(here, **batch_on_device()).cpu(), expected, rtol=1e-3, atol=1e-3)
    gradients = gradients_of(there, **batch)
    for key, found in gradients_of(here, **batch_on_device()).items():
        assert found is None or torch.allclose(found.cpu(), gradients[key], rtol=1e-2, atol=1e-3), key
