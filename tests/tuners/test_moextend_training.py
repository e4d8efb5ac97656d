"""Training moves new weights only, whatever the loop; several adapters share one base."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from test_moextend_families import (
    BY_NAME,
    choices_of,
    config_for,
    every_family,
    extend,
    gradients_of,
    logits_of,
    routers_of,
    shaken,
)
from torch import nn
from transformers import Trainer, TrainingArguments

from tiny_moe import NUM_EXPERTS, MoeFamily, moe_batch


MIXTRAL = BY_NAME["mixtral"]


def rows(num_rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """A data set."""
    return [{name: tensor[0] for name, tensor in moe_batch(1, seed=seed).items()} for seed in range(num_rows)]


def train(model: nn.Module, folder, **settings) -> None:
    """Two steps with the plain Trainer."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, TrainingArguments(**{**defaults, **settings}), train_dataset=rows()).train()


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What belongs to the base model."""
    return {name: tensor for name, tensor in model.state_dict().items() if "moextend_" not in name}


@every_family
def test_two_steps_move_the_new_weights_and_no_old_one(family: MoeFamily, tmp_path):
    model = extend(family, calibration="paper", router_aux_loss_coef=0.01)
    pointers = {name: tensor.data_ptr() for name, tensor in base_tensors(model).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tmp_path)
    after = model.state_dict()
    for name, pointer in pointers.items():
        assert after[name].data_ptr() == pointer, name
        assert torch.equal(after[name], before[name]), name
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("moextend_" in name for name in trained)
    moved = [name for name in trained if not torch.equal(after[name], before[name])]
    assert {"moextend_gate", "moextend_experts", "moextend_calibration"} == {
        part for name in moved for part in name.split(".") if part.startswith("moextend_")
    }


def test_evaluation_mode_with_gradients_reaches_experts_that_no_token_chose():
    model = extend(MIXTRAL, init="copy_guarded")
    expected = logits_of(MIXTRAL.build())
    output = model(**moe_batch())
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters() if ".moextend_experts." in n}
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_wrapping_copies_no_frozen_weight():
    model = MIXTRAL.build()
    pointers = sorted(parameter.data_ptr() for parameter in model.parameters())
    from peft import get_peft_model

    adapted = get_peft_model(model, config_for(MIXTRAL))
    assert sorted(p.data_ptr() for p in adapted.parameters() if not p.requires_grad) == pointers


@every_family
def test_gradient_checkpointing_changes_no_gradient(family: MoeFamily):
    found = []
    for kind in ("none", "non_reentrant", "reentrant"):
        model = extend(family, shake=0.1, router_aux_loss_coef=0.1)
        model.train()
        for module in model.modules():  # no dropout, no sampling: two runs have to agree
            module.training = isinstance(module, nn.Module) and hasattr(module, "gradient_checkpointing")
        for router in routers_of(model):
            router.training = True
        if kind != "none":
            if not getattr(model.base_model.model, "supports_gradient_checkpointing", False):
                pytest.skip("the family has no gradient checkpointing")
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        calls = []
        routers_of(model)[0].base_layer.register_forward_hook(lambda *args: calls.append(1))
        model(**moe_batch(), use_cache=False).loss.backward()
        assert len(calls) == (1 if kind == "none" else 2), kind
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for gradients in found[1:]:
        for name, expected in found[0].items():
            if expected is None:
                assert gradients[name] is None or not gradients[name].any()
            else:
                torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def two_adapters() -> PeftModel:
    """One in layers 0 and 1, one in layers 1 and 2 with two experts."""
    model = extend(MIXTRAL, layers=[0, 1], copy_sources={0: 1, 1: 1}, shake=0.1)
    other = config_for(MIXTRAL, num_new_experts={1: 2, 2: 2}, copy_sources={1: 0, 2: 3})
    model.add_adapter("other", other)
    model.set_adapter("other")
    shaken(model, 0.2)
    return model.eval()


def test_adapters_are_active_together():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    widths = []
    for router in routers_of(model):
        router.register_forward_hook(lambda module, args, output: widths.append(output[0].shape[-1]))
    both = logits_of(model)
    assert widths == [5, 7, 6]
    assert both.isfinite().all()
    model.train()
    model(**moe_batch()).loss.backward()
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None} == {"default", "other"}


def test_adapters_that_are_active_together_are_the_merged_model_of_both():
    model = extend(MIXTRAL, shake=0.1, num_new_experts=2)
    model.add_adapter("other", config_for(MIXTRAL, num_new_experts=3, copy_sources={0: 0, 1: 2, 2: 3}))
    names = ["default", "other"]
    model.base_model.set_adapter(names)
    shaken(model.eval(), 0.1)
    chosen = torch.cat(choices_of(model))
    assert (chosen[chosen >= NUM_EXPERTS] < NUM_EXPERTS + 2).any() and (chosen >= NUM_EXPERTS + 2).any()
    both, gradients = logits_of(model), gradients_of(model)
    own = {name.replace(".default.", ".{}."): None for name in gradients if ".default." in name}
    whole = {name: torch.cat([gradients[name.format(adapter)] for adapter in names]) for name in own}
    merged = model.merge_and_unload().requires_grad_(True)
    assert merged.config.num_local_experts == NUM_EXPERTS + 2 + 3
    torch.testing.assert_close(logits_of(merged), both, rtol=1e-5, atol=2e-5)
    expected = gradients_of(merged)
    for name, found in whole.items():
        plain = name.removeprefix("base_model.model.")
        for container in ("moextend_gate", "moextend_experts"):
            plain = plain.replace(f"{container}.{{}}.", "")
        torch.testing.assert_close(found, expected[plain][NUM_EXPERTS:], rtol=1e-4, atol=1e-5, msg=name)
    assert len(whole) == 3 * 3


def test_calibrated_adapters_are_not_active_together():
    model = extend(MIXTRAL, calibration="released_code")
    model.add_adapter("other", config_for(MIXTRAL))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match="active together, but 'default' has a calibration"):
        logits_of(model)


@pytest.mark.slow
def test_a_compiled_forward_is_the_eager_one():
    model = extend(MIXTRAL, shake=0.1)
    expected = logits_of(model)
    model.base_model.model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits_of(compiled), expected, rtol=1e-4, atol=1e-5)
