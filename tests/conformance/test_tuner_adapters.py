"""What PEFT does with the adapters of a model works with every tuner."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from tuner_cases import CASES, every_tuner, one_case_per_tuner

from peft_moe.routing_recorder import get_recorder


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_every_registered_tuner_of_ours_has_a_row():
    ours = {
        str(member.value).lower()
        for member, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if config.__module__.partition(".")[0] == "peft_moe"
    }
    assert ours == {case.tuner for case in CASES}


@every_tuner
def test_only_the_adapter_is_trainable(case):
    model = case.wrap()
    prefix = f"{case.tuner}_"
    assert all(p.requires_grad == (prefix in name) for name, p in model.named_parameters())
    assert all(
        name.split(prefix)[1].split(".")[1] == "default" for name, p in model.named_parameters() if p.requires_grad
    )


@every_tuner
def test_disabled_adapter_is_the_base_model(case):
    model = case.wrap()
    assert not torch.equal(case.logits(model), case.base_logits())
    with model.disable_adapter():
        assert torch.equal(case.logits(model), case.base_logits())
    assert not torch.equal(case.logits(model), case.base_logits())


@every_tuner
def test_adapters_of_other_shapes_live_side_by_side(case):
    model = case.wrap()
    first = case.logits(model)
    model.add_adapter("other", case.other_config())
    assert torch.equal(case.logits(model), first)
    model.set_adapter("other")
    other = case.logits(model)
    assert not torch.equal(other, first)
    model.set_adapter("default")
    assert torch.equal(case.logits(model), first)


@every_tuner
def test_only_the_active_adapter_gets_gradients(case):
    model = case.wrap().train()
    model.add_adapter("other", case.other_config())
    model.set_adapter("other")
    model(**case.batch()).loss.backward()
    assert all((p.grad is not None) == (".other." in name) for name, p in model.named_parameters())


@every_tuner
def test_active_adapters_add_up(case):
    if not case.adapts_linears:
        pytest.skip("new experts of two adapters stand beside each other behind one router: they do not add up")
    model = case.wrap()
    model.add_adapter("other", case.other_config())
    layer = tuner_layers(model)[0]
    x = torch.randn(2, 5, layer.in_features)
    base = layer.base_layer(x)
    changes = []
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        with get_recorder(model).context.surround(case.for_routers()):
            changes.append(layer(x) - base)
    torch.testing.assert_close(changes[0] + changes[1], changes[2], rtol=1e-5, atol=1e-5)
    whole = case.logits(model)
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(case.logits(model), whole, rtol=1e-4, atol=1e-5)


@every_tuner
def test_two_active_adapters_train_together(case):
    model = case.wrap().train()
    model.add_adapter("other", case.other_config())
    model.base_model.set_adapter(["default", "other"])
    model(**case.batch()).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    # a new expert may be one that no token chose
    assert not case.adapts_linears or all(gradient.any() for gradient in gradients)


@every_tuner
def test_deleted_adapter_leaves_no_parameter_and_work_goes_on(case):
    model = case.wrap().train()
    model.add_adapter("other", case.other_config())
    kept = case.logits(model)
    model.delete_adapter("other")
    assert not any(".other." in name for name in model.state_dict())
    for layer in tuner_layers(model):
        left = [
            name for name in layer.adapter_layer_names + layer.other_param_names if "other" in getattr(layer, name)
        ]
        assert left == []
    assert torch.equal(case.logits(model), kept)
    model(**case.batch()).loss.backward()
    model.add_adapter("other", case.config())
    model.set_adapter("other")
    model(**case.batch()).loss.backward()


@every_tuner
def test_deleting_the_active_adapter_activates_another_one(case):
    model = case.wrap()
    model.add_adapter("other", case.other_config())
    model.set_adapter("other")
    expected = case.logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(case.logits(model), expected)


@every_tuner
def test_deleting_the_last_adapter_gives_the_base_model(case):
    model = case.wrap()
    model.delete_adapter("default")
    assert torch.equal(case.logits(model.base_model.model), case.base_logits())


@one_case_per_tuner
def test_replacing_an_adapter_of_the_same_name_takes_the_new_shapes(case):
    model = case.wrap()
    model.delete_adapter("default")
    model.add_adapter("default", case.other_config())
    model.set_adapter("default")
    fresh = case.model()
    torch.manual_seed(1)
    expected = get_peft_model(fresh, case.other_config())
    found, wanted = (
        {name: p.shape for name, p in adapted.named_parameters() if f".{case.tuner}_" in name}
        for adapted in (model, expected)
    )
    assert found == wanted
    case.logits(model)


@one_case_per_tuner
def test_an_adapter_of_another_kind_is_refused(case):
    model = case.wrap()
    with pytest.raises(ValueError, match=f"different peft types.*{case.tuner.upper()}.*LORA"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    case.logits(model)


@one_case_per_tuner
def test_mixed_models_name_the_type_that_does_not_fit(case):
    with pytest.raises(ValueError, match=case.tuner.upper()):
        get_peft_model(case.model(), case.config(), mixed=True)


@every_tuner
def test_modules_to_save_train_and_switch_with_the_adapter(case):
    model = case.wrap(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model.train()(**case.batch()).loss.backward()
    heads = [name for name, p in model.named_parameters() if p.grad is not None and "modules_to_save" in name]
    assert len(heads) == 1
    with model.eval().disable_adapter():
        assert torch.equal(case.logits(model), case.base_logits())


@every_tuner
def test_injected_model_needs_no_peft_model(case):
    expected = case.logits(case.wrap())
    model = case.model()
    torch.manual_seed(7)
    model = inject_adapter_in_model(case.config(), model).eval()
    assert not isinstance(model, PeftModel)
    assert torch.equal(case.logits(model), expected)


@one_case_per_tuner
def test_injection_on_the_meta_device_makes_no_real_weight(case):
    model = inject_adapter_in_model(case.config(), case.model(), low_cpu_mem_usage=True)
    adapter = [p for name, p in model.named_parameters() if f"{case.tuner}_" in name]
    assert adapter
    assert all(p.is_meta for p in adapter)


@every_tuner
def test_model_without_a_task_type_is_a_plain_peft_model(case):
    model = case.wrap(task_type=None)
    assert type(model) is PeftModel
    assert torch.equal(case.logits(model), case.logits(case.wrap()))


@one_case_per_tuner
def test_trainable_parameters_are_counted(case, capsys):
    model = case.wrap()
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {trainable:,} " in capsys.readouterr().out


@one_case_per_tuner
def test_status_names_type_adapters_and_layers(case):
    model = case.wrap()
    model.add_adapter("other", case.other_config())
    status = get_model_status(model)
    assert status.adapter_model_type == type(model.base_model).__name__
    assert status.peft_types == {"default": case.tuner.upper(), "other": case.tuner.upper()}
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == len(tuner_layers(model))
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = get_layer_status(model)
    assert len(layers) == status.num_adapter_layers
    assert all(layer.enabled and not layer.merged_adapters for layer in layers)


@one_case_per_tuner
def test_weighted_sums_of_adapters_are_not_offered(case):
    with pytest.raises(AttributeError, match="add_weighted_adapter"):
        case.wrap().add_weighted_adapter(["default"], [1.0], "sum")


@one_case_per_tuner
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_per_sample_is_refused_and_not_ignored(case, call):
    model = case.wrap()
    with pytest.raises(ValueError, match=r"adapter_names=\['__base__', 'default'\]. Split the batch"):
        getattr(model, call)(input_ids=case.batch()["input_ids"], adapter_names=["__base__", "default"])


@one_case_per_tuner
def test_hotswapping_is_refused_by_name(case, tmp_path):
    model = case.wrap()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"only supports LORA but {case.tuner.upper()} was passed"):
        hotswap_adapter(model, tmp_path, "default")


@every_tuner
def test_reference_copy_of_preference_training_finds_every_parameter(case):
    """trl copies a policy adapter by replacing `.default.` with `.ref.` in the names of its parameters."""
    model = case.wrap()
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    policy = [name for name in parameters if ".default." in name]
    assert len(policy) == sum(".ref." in name for name in parameters)
    for name in policy:
        parameters[name.replace(".default.", ".ref.")].data.copy_(parameters[name].data)
    expected = case.logits(model)
    model.set_adapter("ref")
    assert torch.equal(case.logits(model), expected)


@every_tuner
def test_unloaded_model_is_the_base_model_without_a_trace(case):
    model = case.wrap()
    case.logits(model)
    base = model.unload()
    assert tuner_layers(base) == []
    assert base.state_dict().keys() == case.model().state_dict().keys()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in base.modules()
    )
    assert torch.equal(case.logits(base), case.base_logits())
    again = get_peft_model(base, case.config())
    again.train()(**case.batch()).loss.backward()


@every_tuner
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch-save"])
def test_copies_compute_the_same_and_are_independent(case, how):
    model = case.wrap()
    expected = case.logits(model)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert torch.equal(case.logits(clone), expected)
    clone.train()(**case.batch()).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if f"{case.tuner}_" in name:
                parameter.zero_()
    assert torch.equal(case.logits(model), expected)


@every_tuner
def test_copy_between_forward_and_backward_leaves_the_original_intact(case):
    gradients = []
    for interrupt in (False, True):
        model = case.wrap().train()
        loss = model(**case.batch()).loss
        if interrupt:
            copy.deepcopy(case.wrap())
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class TestTransformersMethods:
    """The adapter methods that transformers gives every model."""

    @every_tuner
    def test_added_adapter_is_that_of_peft_and_trains_with_its_auxiliary_loss(self, case):
        added = case.model()
        torch.manual_seed(7)
        added.add_adapter(case.config())
        assert added.active_adapters() == ["default"]
        gradients = []
        for model in (case.wrap(), added):
            assert torch.equal(case.logits(model.eval()), case.logits(case.wrap()))
            model.train()(**case.batch()).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @every_tuner
    def test_adapters_are_switched_disabled_and_deleted(self, case):
        model = case.model().eval()
        model.add_adapter(case.config(), adapter_name="one")
        one = case.logits(model)
        model.add_adapter(case.other_config(), adapter_name="two")
        model.set_adapter("two")
        assert not torch.equal(case.logits(model), one)
        model.set_adapter("one")
        assert torch.equal(case.logits(model), one)
        model.disable_adapters()
        assert torch.equal(case.logits(model), case.base_logits())
        model.enable_adapters()
        assert torch.equal(case.logits(model), one)
        model.delete_adapter("two")
        assert not any(".two." in name for name in model.state_dict())
        assert torch.equal(case.logits(model), one)
        model.train()(**case.batch()).loss.backward()
