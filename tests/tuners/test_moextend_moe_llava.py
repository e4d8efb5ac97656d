"""Our own MoeLlava is extended as the families of transformers are, with pictures in its input."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from test_moextend_families import IMPLEMENTATIONS, choices_of, extend_llava, gradients_of, logits_of
from torch import nn

from tiny_moe import NUM_EXPERTS, image_batch, tiny_moe_llava


SETTINGS = {"num_new_experts": {0: 1, 2: 2}, "shake": 0.1}


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
