"""The auxiliary losses of MoeLlava: part of the loss, with a gradient for every router, or an error says why not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models.tiny_llava import image_batch, labels_of, sparse_llava, train
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava import modeling_moe_llava
from peft_moe.models.moe_llava.stages import MoeTuningStage


def test_training_loss_holds_the_routers_losses_and_evaluation_does_not():
    model, batch = sparse_llava(router_aux_loss_coef=0.5, router_z_loss_coef=0.25), image_batch(num_padding=2)
    labels = labels_of(batch)
    plain = model(**batch, labels=labels)
    assert plain.aux_loss is None and plain.router_logits is None
    trained = model.train()(**batch, labels=labels)
    expected = plain.loss + 0.5 * trained.aux_loss + 0.25 * trained.z_loss
    torch.testing.assert_close(trained.loss, expected)
    assert trained.router_logits is None
    asked = model.eval()(**batch, labels=labels, output_router_logits=True)
    torch.testing.assert_close(asked.loss, expected)
    assert len(asked.router_logits) == 2


def test_coefficients_of_zero_leave_the_loss_alone():
    model, batch = sparse_llava(router_aux_loss_coef=0.0).train(), image_batch()
    output = model(**batch, labels=labels_of(batch))
    assert output.aux_loss is None
    model.eval()
    torch.testing.assert_close(output.loss, model(**batch, labels=labels_of(batch)).loss)


def test_losses_of_accumulated_batches_add_up_to_one_mean():
    model = sparse_llava(router_aux_loss_coef=0.5).train()
    batches = [image_batch(num_padding=2), image_batch(num_text_tokens=3, seed=4)]
    items = [int((labels_of(batch)[:, 1:] != -100).sum()) for batch in batches]
    found = sum(model(**b, labels=labels_of(b), num_items_in_batch=torch.tensor(sum(items))).loss for b in batches)
    means = [model(**batch, labels=labels_of(batch)).loss for batch in batches]
    expected = sum(count * mean for count, mean in zip(items, means, strict=True)) / sum(items)
    torch.testing.assert_close(found, expected)


def test_auxiliary_loss_reaches_every_router():
    model, batch = sparse_llava(moe_layers="all").train(), image_batch()
    model(**batch, output_router_logits=True).aux_loss.backward()
    for layer in model.model.language_model.layers:
        assert float(layer.mlp.gate.weight.grad.abs().max()) > 0


def test_reentrant_checkpointing_raises_instead_of_losing_a_gradient():
    model, batch = sparse_llava().train(), image_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match='"use_reentrant": False'):
        model(**batch, labels=labels_of(batch), use_cache=False)
    model.config.router_aux_loss_coef = 0.0
    model(**batch, labels=labels_of(batch), use_cache=False).loss.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("how", ["lower-layers-frozen", "lora-on-the-last"])
def test_a_router_that_does_not_train_needs_no_gradient(how, reentrant):
    model, batch = sparse_llava().train(), image_batch()
    gates = [model.model.language_model.layers[index].mlp.gate for index in (0, 2)]
    if how == "lora-on-the-last":
        names = r".*language_model.layers.2.self_attn\.(q|v)_proj"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=names, modules_to_save=["layers.2.mlp.gate"]))
        model = model.get_base_model()
    else:
        MoeTuningStage("III", projector=False).apply(model)
        model.model.language_model.layers[0].requires_grad_(False)
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="router of layer 2 have no gradient"):
            model(**batch, labels=labels_of(batch), use_cache=False)
        return
    model(**batch, labels=labels_of(batch), use_cache=False).loss.backward()
    assert gates[0].weight.grad is None
    assert float(model.model.language_model.layers[2].mlp.gate.weight.grad.abs().max()) > 0


@pytest.fixture
def no_warning_yet():
    modeling_moe_llava._warn_of_missing_labels.cache_clear()
    yield
    modeling_moe_llava._warn_of_missing_labels.cache_clear()


def test_training_without_labels_warns_once(no_warning_yet):
    model, batch = sparse_llava().train(), image_batch()
    with pytest.warns(UserWarning, match="label_smoothing_factor.*outputs.aux_loss") as found:
        model(**batch)
        model(**batch)
    assert sum("label_smoothing_factor" in str(warning.message) for warning in found) == 1


@pytest.mark.parametrize("case", ["labels", "evaluation", "no_grad", "returned", "coefficient 0", "frozen routers"])
def test_nothing_is_lost_and_nothing_is_said(no_warning_yet, case):
    model, batch = sparse_llava().train(case != "evaluation"), image_batch()
    if case == "labels":
        batch["labels"] = labels_of(batch)
    elif case == "returned":
        model.config.text_config.output_router_logits = True
    elif case == "coefficient 0":
        model.config.text_config.router_aux_loss_coef = 0.0
    elif case == "frozen routers":
        MoeTuningStage("I").apply(model)
    with warnings.catch_warnings(), torch.set_grad_enabled(case != "no_grad"):
        warnings.simplefilter("error", UserWarning)
        model(**batch)


@pytest.mark.slow
def test_label_smoothing_of_the_trainer_warns_and_its_evaluation_does_not(no_warning_yet, tmp_path):
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        trainer = train(sparse_llava(), tmp_path, max_steps=1, label_smoothing_factor=0.1)
    modeling_moe_llava._warn_of_missing_labels.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.evaluate()
    assert not any("label_smoothing_factor" in str(warning.message) for warning in found)


def test_number_of_experts_per_token_is_fixed_once_built(tmp_path):
    model, batch = sparse_llava(), image_batch()
    model.save_pretrained(tmp_path)
    model.config.num_experts_per_tok = 1
    for use in (lambda: model(**batch), lambda: model.save_pretrained(tmp_path / "other")):
        with pytest.raises(ValueError, match=r"set to 1, but the routers .* built for 2.*num_experts_per_tok=\.\.\."):
            use()
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, num_experts_per_tok=1)
    assert loaded.model.language_model.layers[0].mlp.gate.top_k == 1
    assert len(loaded(**batch, output_router_logits=True).router_logits) == 2


def test_what_trainers_change_on_the_text_configuration_is_saved(tmp_path):
    model, batch = sparse_llava(), image_batch()
    model.config.text_config.router_aux_loss_coef = 0.5
    model.config.text_config.output_router_logits = True
    model.save_pretrained(tmp_path)
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    for config in (loaded.config, loaded.config.text_config, copy.deepcopy(model.config).text_config):
        assert (config.router_aux_loss_coef, config.output_router_logits) == (0.5, True)
    labels = labels_of(batch)
    torch.testing.assert_close(loaded(**batch, labels=labels).loss, model(**batch, labels=labels).loss)
