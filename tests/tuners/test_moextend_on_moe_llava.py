"""The routers of MoeLlava are balanced once, by the adapter; a merged model has the projector trained with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from test_moextend_families import BY_NAME, logits_of, shaken
from torch import nn

from peft_moe import MoExtendConfig
from tiny_moe import image_batch, moe_batch, tiny_moe_llava


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def extended(own_coef: float, **settings) -> nn.Module:
    base = tiny_moe_llava()
    for config in (base.config, base.config.text_config):
        config.router_aux_loss_coef = own_coef
    model = get_peft_model(base, MoExtendConfig(task_type="CAUSAL_LM", **settings)).train()
    shaken(model, 0.1)
    return model


def loss_and_gradients(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    outputs = model(**image_batch(), **inputs)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": outputs.loss.detach(), **found}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("asked", [{}, {"output_router_logits": True}, {"output_router_logits": False}], ids=str)
def test_the_loss_of_its_own_is_left_out_whatever_its_coefficient(asked):
    model = extended(10.0, layers=[0], router_aux_loss_coef=0.1)
    expected = loss_and_gradients(extended(0.0, layers=[0], router_aux_loss_coef=0.1))
    assert_equal(loss_and_gradients(model, **asked), expected)
    with model.disable_adapter():
        alone = model(**image_batch()).loss
    assert alone > expected["loss"] + 1, "without new experts it counts as before"


def test_router_logits_are_there_for_who_asks():
    model = extended(0.01, layers=[0])
    assert model(**image_batch()).router_logits is None
    widths = [logits.shape[-1] for logits in model(**image_batch(), output_router_logits=True).router_logits]
    assert widths[0] == widths[-1] + 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant):
    model = extended(0.01, router_aux_loss_coef=0.1)
    expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_equal(loss_and_gradients(model), expected)


@pytest.mark.parametrize(
    ("build", "module", "batch"),
    [
        (BY_NAME["mixtral"].build, "lm_head", moe_batch),
        (tiny_moe_llava, "multi_modal_projector", image_batch),
    ],
    ids=["mixtral", "moe_llava"],
)
def test_a_merged_adapter_brings_its_own_modules_to_save(build, module, batch):
    config = MoExtendConfig(modules_to_save=[module], task_type="CAUSAL_LM")
    model = get_peft_model(build(), config).eval()
    shaken(model, 0.1)
    model.add_adapter("other", config)
    model.set_adapter("other")
    shaken(model, 0.3)
    other = logits_of(model.eval(), **batch())
    model.set_adapter("default")
    expected = logits_of(model.eval(), **batch())
    model.set_adapter("other")
    merged = model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(logits_of(merged.eval(), **batch()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, other, atol=1e-2)
