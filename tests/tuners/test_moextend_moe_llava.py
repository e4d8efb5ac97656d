"""Our own MoeLlava is extended as the families of transformers are, with pictures in its input, and balanced once."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_moextend_families import BY_NAME, IMPLEMENTATIONS, choices_of, extend_llava, gradients_of, logits_of, shaken
from torch import nn

from peft_moe import MoExtendConfig
from tiny_moe import NUM_EXPERTS, image_batch, moe_batch, tiny_moe_llava


SETTINGS = {"num_new_experts": {0: 1, 2: 2}, "shake": 0.1}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """A step of AdamW; returns the gradients."""
    gradients = gradients_of(model.train(), **image_batch())
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0).step()
    return gradients


def test_gradients_reach_the_new_weights_alone_and_a_step_moves_no_other():
    model = extend_llava(**SETTINGS, calibration="paper", router_aux_loss_coef=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = train_once(model)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(gradients)
    assert all("moextend_" in name and gradient.any() for name, gradient in gradients.items())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(gradients)


def test_experts_implementations_agree_in_outputs_and_gradients():
    model = extend_llava(**SETTINGS)
    assert all((chosen >= NUM_EXPERTS).any() for chosen in choices_of(model, **image_batch()))
    found = {}
    for implementation in IMPLEMENTATIONS:
        model.base_model.model.set_experts_implementation(implementation)
        found[implementation] = logits_of(model, **image_batch()), gradients_of(model, **image_batch())
    expected, gradients = found["eager"]
    for logits, other in (found[implementation] for implementation in IMPLEMENTATIONS[1:]):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_generation_with_a_cache_is_generation_without():
    model = extend_llava(**SETTINGS)
    prompt = {name: tensor for name, tensor in image_batch().items() if name != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = [model.generate(**prompt, **settings, use_cache=use_cache) for use_cache in (True, False)]
    assert found[0].shape[1] == prompt["input_ids"].shape[1] + 4
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["released_code", "paper"])
def test_a_saved_adapter_comes_back_to_the_bit_on_every_path(form, tmp_path):
    model = extend_llava(**SETTINGS, calibration=form)
    expected = logits_of(model, **image_batch())
    with model.disable_adapter():
        assert torch.equal(logits_of(model, **image_batch()), logits_of(tiny_moe_llava(), **image_batch()))
    model.save_pretrained(tmp_path)
    own = {name: tensor for name, tensor in model.state_dict().items() if "moextend_" in name}
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny_moe_llava(), tmp_path, **settings).eval()
        state = loaded.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in own.items()), settings
        assert torch.equal(logits_of(loaded, **image_batch()), expected), settings
    plain = tiny_moe_llava()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(plain, **image_batch()), expected)


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


@pytest.mark.parametrize("asked", [{}, {"output_router_logits": False}], ids=str)
def test_the_loss_of_its_own_is_left_out_whatever_its_coefficient(asked):
    model = extended(10.0, layers=[0], router_aux_loss_coef=0.1)
    expected = loss_and_gradients(extended(0.0, layers=[0], router_aux_loss_coef=0.1))
    assert_equal(loss_and_gradients(model, **asked), expected)
    with model.disable_adapter():
        alone = model(**image_batch()).loss
    assert alone > expected["loss"] + 1, "without new experts it counts as before"


def test_router_logits_are_refused():
    model = extended(0.01, layers=[0])
    assert model(**image_batch()).router_logits is None
    with pytest.raises(ValueError, match="MoeLlavaForConditionalGeneration was asked for router logits"):
        model(**image_batch(), output_router_logits=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant):
    model = extended(0.01, router_aux_loss_coef=0.1)
    expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_equal(loss_and_gradients(model), expected)


@pytest.mark.parametrize(
    ("build", "module", "batch"),
    [(BY_NAME["mixtral"].build, "lm_head", moe_batch), (tiny_moe_llava, "multi_modal_projector", image_batch)],
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
