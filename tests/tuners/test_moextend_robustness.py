"""Bases, precisions and combinations off the beaten track: they work as any other, or are refused with the reason."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from test_moextend_families import BY_NAME, choices_of, config_for, extend, logits_of, routers_of, shaken
from test_moextend_training import rows
from torch import nn
from transformers import TrainingArguments

from peft_moe import Extender, get_aux_loss
from peft_moe.aux_loss import load_balancing_loss
from peft_moe.foreign_moe import find_moe_blocks
from peft_moe.routing_recorder import statistics_of
from peft_moe.tuners.base import check_finite
from peft_moe.tuners.moextend.experts import MoExtendExperts
from peft_moe.tuners.moextend.layer import MoExtendLayer
from tiny_moe import NUM_EXPERTS, MoeFamily, moe_batch


MIXTRAL, DEEPSEEK = BY_NAME["mixtral"], BY_NAME["deepseek_v3"]


def experts_of(model: nn.Module) -> list[MoExtendExperts]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, MoExtendExperts)]


def dispatched() -> nn.Module:
    """A base whose modules carry the hooks of a device map."""
    return dispatch_model(MIXTRAL.build(), {"": "cpu"}, force_hooks=True)


def compiled() -> nn.Module:
    """A base whose experts are compiled."""
    model = MIXTRAL.build()
    for layer in model.model.layers:
        layer.mlp.experts.compile(backend="eager")
    return model


@pytest.mark.parametrize("expert_type", ["ffn", "lora"])
@pytest.mark.parametrize("build", [dispatched, compiled])
def test_new_experts_compute_with_their_own_weights_whatever_wraps_the_base(build, expert_type):
    expected = logits_of(extend(MIXTRAL, shake=0.1, expert_type=expert_type))
    model = get_peft_model(build(), config_for(MIXTRAL, expert_type=expert_type)).eval()
    shaken(model, 0.1)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    model.train()
    model(**moe_batch()).loss.backward()
    for experts in experts_of(model):
        for name, parameter in experts.moextend_experts["default"].named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_float8_experts_are_refused():
    class Float8Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("gate_up_proj", "down_proj"):
                weight = torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)
                self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
                self.register_parameter(f"{name}_scale_inv", nn.Parameter(torch.ones(4, 1, 1)))

    model = MIXTRAL.build()
    model.model.layers[1].mlp.experts = Float8Experts()
    with pytest.raises(ValueError, match=r"is quantised: it holds 'gate_up_proj' \(float8_e4m3fn\).*scale_inv"):
        get_peft_model(model, config_for(MIXTRAL, layers=[1], copy_sources={1: 0}))
    for name in ("gate_up_proj", "down_proj"):
        weight = nn.Parameter(torch.zeros(4, 8, 8))
        setattr(model.model.layers[1].mlp.experts, name, weight)
    _, refused = find_moe_blocks(model)
    assert len(refused) == 1 and "'gate_up_proj_scale_inv' (float32)" in refused[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_may_have_a_sum_that_is_not(dtype):
    values = torch.full((4096,), 100.0, dtype=dtype)
    check_finite(values, "They have values")
    values[5] = float("inf")
    with pytest.raises(FloatingPointError, match="They have values that are not finite"):
        check_finite(values, "They have values")


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_zero_gate_does_not_depend_on_the_zero_of_the_corrections(shift):
    def chosen(by: float) -> list[torch.Tensor]:
        base = DEEPSEEK.build()
        for layer in base.model.layers:
            layer.mlp.gate.e_score_correction_bias.add_(by)
        return choices_of(get_peft_model(base, config_for(DEEPSEEK, init="zero_gate")).eval())

    plain = chosen(0.0)
    assert any((index >= NUM_EXPERTS).any() for index in plain)
    for one, other in zip(chosen(shift), plain, strict=True):
        assert torch.equal(one.sort().values, other.sort().values)


def test_corrections_in_float32_are_not_rounded_to_the_weights(tmp_path):
    def base() -> nn.Module:
        model = DEEPSEEK.build()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([3.909, 3.923, 3.931, 3.917]))
        return model

    model = get_peft_model(base(), config_for(DEEPSEEK)).eval()
    model.save_pretrained(tmp_path)
    models = [model, *(PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low) for low in (False, True))]
    for found in models:
        correction = routers_of(found)[0].moextend_gate["default"].e_score_correction_bias
        assert torch.equal(correction, torch.tensor([3.923]))


def test_the_extender_counts_in_the_precision_of_training(tmp_path):
    base = MIXTRAL.build()
    seen = []
    base.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    args = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[], disable_tqdm=True)
    Extender(base).measure(rows(), rows(), steps=1, batch_size=4, learning_rate=1e-3, args=args)
    assert len(seen) >= 3 and set(seen) == {torch.bfloat16}


def test_the_extender_evaluates_nothing(tmp_path):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, eval_on_start=True, eval_strategy="steps"
    )
    assert Extender(MIXTRAL.build()).measure(rows(), rows(), steps=1, batch_size=4, args=args).shift
    assert args.eval_on_start


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
@pytest.mark.parametrize("coefs", [(0.0, 0.5), (0.5, 0.0), (0.5, 0.5)])
def test_adapters_that_act_together_are_balanced_once(coefs, order):
    model = extend(MIXTRAL, shake=0.1, router_aux_loss_coef=coefs[0])
    model.add_adapter("other", config_for(MIXTRAL, router_aux_loss_coef=coefs[1]))
    model.base_model.set_adapter(order)
    model.train()
    found = model(**moe_batch())
    aux_loss = get_aux_loss(model)
    (records,) = statistics_of(model.base_model.recorder.context.latest).values()
    assert float(aux_loss.detach()) == pytest.approx(0.5 * float(load_balancing_loss([*records.values()])), rel=1e-5)
    assert float(aux_loss.detach()) > 0.4
    gates = [router.moextend_gate[name].weight for router in routers_of(model) for name in order]
    expected = torch.autograd.grad(found.loss + aux_loss, gates)
    model(**moe_batch()).loss.backward()
    for gate, gradient in zip(gates, expected, strict=True):
        torch.testing.assert_close(gate.grad, gradient, rtol=1e-4, atol=1e-6)


def test_adapters_of_different_layers_are_both_balanced():
    model = extend(MIXTRAL, shake=0.1, layers=[0, 1], copy_sources={0: 1, 1: 1}, router_aux_loss_coef=0.0)
    other = {"layers": [1, 2], "copy_sources": {1: 0, 2: 3}, "router_aux_loss_coef": 0.5}
    model.add_adapter("other", config_for(MIXTRAL, **other))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.recorder.listeners.append(lambda forward_pass: None)  # else a record without a loss is not made
    model.train()(**moe_batch())
    records = statistics_of(model.base_model.recorder.context.latest)
    names = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]
    assert {name: sorted(entry) for name, entry in records.items()} == {"default": names[:1], "other": names[1:]}
    entries = [records["default"][names[0]], records["other"][names[1]], records["other"][names[2]]]
    expected = 0.5 * load_balancing_loss(entries[1:])
    torch.testing.assert_close(get_aux_loss(model).detach(), expected)


def test_after_a_deletion_all_layers_have_the_same_active_adapter():
    model = extend(MIXTRAL, layers=[0, 1], copy_sources={0: 1, 1: 1})
    model.add_adapter("first", config_for(MIXTRAL, layers=[0], copy_sources={0: 1}))
    model.add_adapter("second", config_for(MIXTRAL, layers=[1], copy_sources={1: 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == ["first"]
    layers = [module for module in model.modules() if isinstance(module, MoExtendLayer)]
    assert all(layer.active_adapters == ["first"] for layer in layers)
    assert [router.acting() for router in routers_of(model)] == [["first"], []]
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"first"}


def test_an_offloaded_base_is_called_that():
    model = cpu_offload(MIXTRAL.build(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="layers.0.mlp.gate' is offloaded to the CPU or a disk"):
        get_peft_model(model, config_for(MIXTRAL))
    assert not any(isinstance(module, MoExtendLayer) for module in model.modules())


def test_router_logits_around_lora_are_refused_and_all_else_works():
    inner = get_peft_model(MIXTRAL.build(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(inner, config_for(MIXTRAL, router_aux_loss_coef=0.1)).train()
    with pytest.raises(ValueError, match="PeftModelForCausalLM was asked for router logits"):
        model(**moe_batch(), output_router_logits=True)
    model(**moe_batch()).loss.backward()
    assert all(router.moextend_gate["default"].weight.grad.any() for router in routers_of(model))


GROUPED = {"deepseek_v3": {}, "deepseek_v2": {"topk_method": "group_limited_greedy"}}


def grouped(name: str) -> MoeFamily:
    """Eight experts in two groups, of which one is chosen first."""
    settings = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, **GROUPED[name]}
    return replace(BY_NAME[name], settings={**BY_NAME[name].settings, **settings})


@pytest.mark.parametrize("name", GROUPED)
def test_new_experts_leave_old_ones_in_their_groups(name):
    family = grouped(name)
    model = extend(family, init="copy_guarded", num_new_experts=4)
    torch.testing.assert_close(logits_of(model), logits_of(family.build()), rtol=1e-5, atol=1e-5)
    router = routers_of(model)[0]
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    found, expected = router(x), router.base_layer(x)
    assert torch.equal(found[2].sort().values, expected[2].sort().values)
    torch.testing.assert_close(found[0][:, :8], expected[0])
    torch.testing.assert_close(found[0][:, 8:] + 17, expected[0][:, [1] * 4], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", GROUPED)
def test_the_new_experts_of_two_adapters_spread_over_the_groups(name):
    family = grouped(name)
    model = extend(family, num_new_experts=2, shake=0.1)
    model.add_adapter("other", config_for(family, num_new_experts=4))
    model.base_model.set_adapter(["default", "other"])
    shaken(model.eval(), 0.3)
    groups = torch.tensor([0] * 4 + [1] * 4 + [0, 1] + [0, 0, 1, 1])
    seen = set()
    for index in choices_of(model, **moe_batch(8, 16)):
        assert (groups[index] == groups[index[:, :1]]).all()
        seen |= set(index.flatten().tolist())
    assert seen > set(range(8, 14))


@pytest.mark.parametrize("name", GROUPED)
def test_a_router_with_groups_merges_into_one_of_the_same_groups(name):
    model = extend(grouped(name), num_new_experts=4, shake=0.2)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    expected = logits_of(model)
    assert any((index >= 8).any() for index in choices_of(model))
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ({}, True),
        ({"router_aux_loss_coef": 0.001}, True),
        ({"guard_offset": -8.0}, True),
        ({"guard_offset": -8.0, "router_aux_loss_coef": 0.001}, False),
        ({"inference_mode": True}, False),
        ({"init": "copy"}, False),
    ],
)
def test_a_guard_that_no_gradient_raises_is_said(settings, is_said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(MIXTRAL.build(), config_for(MIXTRAL, **{"init": "copy_guarded", **settings}))
    assert sum("so they will not learn" in str(entry.message) for entry in caught) == is_said


@pytest.mark.slow
@pytest.mark.parametrize(("guard_offset", "learns"), [(-17.0, False), (-8.0, True)])
def test_what_a_guarded_expert_learns_from_the_balance_loss(guard_offset, learns):
    model = extend(MIXTRAL, init="copy_guarded", guard_offset=guard_offset, router_aux_loss_coef=0.001)
    torch.testing.assert_close(logits_of(model), logits_of(MIXTRAL.build()), rtol=1e-5, atol=1e-5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts = [parameter for name, parameter in model.named_parameters() if "moextend_experts" in name]
    before = [parameter.detach().clone() for parameter in experts]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(300):
        model(**moe_batch(4, 16, seed=step % 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    is_moved = any(not torch.equal(parameter, old) for parameter, old in zip(experts, before, strict=True))
    assert is_moved is learns
    assert any((chosen >= NUM_EXPERTS).any() for chosen in choices_of(model.eval())) is learns
    offsets = torch.cat([router.moextend_gate["default"].offset for router in routers_of(model)])
    assert ((offsets - guard_offset).abs().max() > 0.1) == learns


def test_one_configuration_serves_two_base_models():
    config = config_for(MIXTRAL)
    before = dict(vars(config))
    for count in (4, 8):
        model = get_peft_model(MIXTRAL.build(num_local_experts=count), config)
        assert model.peft_config["default"].base_num_experts == dict.fromkeys(range(3), count)
    after = {name: value for name, value in vars(config).items() if name != "base_model_name_or_path"}
    assert after == {name: value for name, value in before.items() if name != "base_model_name_or_path"}


@pytest.mark.parametrize("name", ["base", "experts"])
def test_a_name_that_means_a_part_of_the_base_model_is_refused(name):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'.*Choose another adapter_name"):
        get_peft_model(MIXTRAL.build(), config_for(MIXTRAL), adapter_name=name)
    model = extend(MIXTRAL)
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        model.add_adapter(name, config_for(MIXTRAL))
    assert list(model.peft_config) == ["default"] and logits_of(model).isfinite().all()


def test_lora_on_the_experts_is_refused():
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM")
    inner = get_peft_model(MIXTRAL.build(), config)
    with pytest.raises(ValueError, match="layers.0.mlp.experts' carries an adapter of another method.*Merge it first"):
        get_peft_model(inner, config_for(MIXTRAL))
    assert not any(isinstance(module, MoExtendLayer) for module in inner.modules())


def test_another_family_of_the_same_shape_is_noticed(tmp_path):
    extend(MIXTRAL).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(MIXTRAL.build(), tmp_path)
    with pytest.warns(UserWarning, match="made for routers of the class Mixtral.*has Olmoe"):
        PeftModel.from_pretrained(BY_NAME["olmoe"].build(), tmp_path)
