"""Every family: the enlarged model of transformers itself is the oracle, and each `init` keeps its promise."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe.foreign_moe import gate_weight_name
from peft_moe.tuners.moextend import MoExtendConfig
from peft_moe.tuners.moextend.experts import MoExtendExperts
from peft_moe.tuners.moextend.router import MoExtendRouter
from tiny_moe import BY_NAME, FAMILIES, NUM_EXPERTS, MoeFamily, moe_batch, tiny_moe_llava


every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=[pytest.mark.slow, pytest.mark.exhaustive] if f.is_further else [])
        for f in FAMILIES
    ],
)
every_guarded_family = pytest.mark.parametrize("family", [p for p in every_family.args[1] if p.values[0].is_linear])


def config_for(family: MoeFamily, **overrides) -> MoExtendConfig:
    """One new expert per layer, a copy of expert 1, without auxiliary loss."""
    defaults = {
        "copy_sources": dict.fromkeys(family.moe_layers, 1),
        "router_aux_loss_coef": 0.0,
        "task_type": "CAUSAL_LM",
    }
    return MoExtendConfig(**{**defaults, **overrides})


def extend(family: MoeFamily, *, shake: float = 0.0, **overrides) -> PeftModel:
    """The extended model in evaluation mode; `shake` moves what trains away from where it begins."""
    model = get_peft_model(family.build(), config_for(family, **overrides)).eval()
    shaken(model, shake)
    return model


def extend_llava(*, shake: float = 0.0, **overrides) -> PeftModel:
    """Our own MoeLlava, extended in its layers with experts; as `extend`."""
    defaults = {"copy_sources": {0: 1, 2: 3}, "router_aux_loss_coef": 0.0, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_moe_llava(), MoExtendConfig(**{**defaults, **overrides})).eval()
    shaken(model, shake)
    return model


def shaken(model: nn.Module, std: float) -> None:
    """Add noise to everything that trains."""
    if std:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += std * torch.randn(parameter.shape, generator=generator)


def logits_of(model: nn.Module, **inputs) -> torch.Tensor:
    """What the model says about the batch."""
    with torch.no_grad():
        return model(**{**moe_batch(), **inputs}).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, family: MoeFamily) -> None:
    """Equal to the bit where the family is."""
    torch.testing.assert_close(found, expected, rtol=0, atol=family.noise)


def routers_of(model: nn.Module) -> list[MoExtendRouter]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, MoExtendRouter)]


def outputs_of(model: nn.Module, **inputs) -> list[tuple[torch.Tensor, ...]]:
    """What each extended router returns for the batch: logits, weights and choices."""
    found = []
    handles = [
        router.register_forward_hook(lambda module, args, output: found.append(output)) for router in routers_of(model)
    ]
    logits_of(model, **inputs)
    for handle in handles:
        handle.remove()
    return found


def scores_of(model: nn.Module) -> list[torch.Tensor]:
    """The logits `(T, E + N)` of each extended router for the batch, also where it returns probabilities of them."""
    routers = routers_of(model)
    if not routers[0].probe.is_probability:
        return [logits for logits, _, _ in outputs_of(model)]
    found = []
    for router in routers:
        owner, _, _ = gate_weight_name(router.base_layer, NUM_EXPERTS).rpartition(".")
        matrix = router.base_layer.get_submodule(owner)
        matrix.register_forward_hook(lambda module, args, output: found.append(output))
    logits_of(model)
    return found


def choices_of(model: nn.Module, **inputs) -> list[torch.Tensor]:
    """What each extended router chooses for the batch."""
    return [index.flatten(0, -2) for _, _, index in outputs_of(model, **inputs)]


def enlarged(family: MoeFamily, adapted: PeftModel, num_new: int = 1) -> nn.Module:
    """The family's own model with more experts, its tensors put together here from those of base and adapter."""
    counts = {key: value for key, value in family.settings.items() if "expert" in key and value == NUM_EXPERTS}
    native = family.build(**dict.fromkeys(counts, NUM_EXPERTS + num_new))
    own = adapted.base_model.model.state_dict()
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in own.items() if "moextend_" not in name}
    state = {
        name: plain[name]
        if plain[name].shape == tensor.shape
        else torch.cat([plain[name], own[new_name(name, own)]], -1 if plain[name].shape[0] == 1 else 0)
        for name, tensor in native.state_dict().items()
    }
    native.load_state_dict(state)
    return native


def new_name(name: str, own: dict) -> str:
    """The key of what an adapter adds to the tensor `name`, itself if that is nothing."""
    parts = name.split(".")
    keys = [
        ".".join([*parts[:depth], container, "default", "_".join(parts[depth:])])
        for depth in range(len(parts))
        for container in ("moextend_gate", "moextend_experts")
    ]
    block = ".".join(parts[:-1])
    keys += [f"{block}.{router}.moextend_gate.default.correction" for router in ("gate", "router")]
    return next((key for key in keys if key in own), name)


@every_family
def test_outputs_and_gradients_are_those_of_the_enlarged_model(family):
    adapted = extend(family, shake=0.1)
    native = enlarged(family, adapted)
    torch.testing.assert_close(logits_of(adapted), logits_of(native), rtol=1e-5, atol=2e-5)
    assert any((chosen >= NUM_EXPERTS).any() for chosen in choices_of(adapted))
    native.requires_grad_(True)
    for model in (adapted, native):
        model(**moe_batch()).loss.backward()
    own = adapted.base_model.model.state_dict()
    expected = {new_name(name, own): parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in adapted.base_model.model.named_parameters():
        if parameter.requires_grad:
            whole = expected[name]
            # in evaluation, an expert without a token has no gradient
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, whole[NUM_EXPERTS:], rtol=1e-4, atol=1e-5, msg=name)


@every_family
def test_disabled_is_the_base_model_to_the_bit(family):
    model = family.build()
    expected = logits_of(model)
    adapted = get_peft_model(model, config_for(family))
    adapted.eval()
    with adapted.disable_adapter():
        assert_same(logits_of(adapted), expected, family)


@every_guarded_family
def test_copy_guarded_is_the_base_model_at_the_start(family):
    adapted = extend(family, init="copy_guarded")
    assert not any((chosen >= NUM_EXPERTS).any() for chosen in choices_of(adapted))
    torch.testing.assert_close(logits_of(adapted), logits_of(family.build()), rtol=1e-5, atol=1e-5)


@every_family
def test_copy_changes_no_token_that_does_not_choose_the_copy(family):
    layer = family.moe_layers[0]
    adapted = extend(family, layers=[layer], copy_sources={layer: 0})
    with adapted.disable_adapter():
        (chosen,) = choices_of(adapted)
    source = int(chosen.flatten().bincount().argmax())
    adapted = extend(family, layers=[layer], copy_sources={layer: source})
    router = routers_of(adapted)[0]
    block = adapted.base_model.model.get_submodule(router.block.name)
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    (chosen,) = choices_of(adapted)
    with adapted.disable_adapter():
        logits_of(adapted)
    handle.remove()
    (_, extended), (_, base) = seen
    extended, base = (entry[0] if isinstance(entry, tuple) else entry for entry in (extended, base))
    keeps = (chosen < NUM_EXPERTS).all(dim=-1)
    assert 0 < keeps.sum() < len(keeps)
    difference = (extended - base).flatten(0, -2).abs().amax(dim=-1)
    if family.normalizes:
        assert difference[keeps].max() < 1e-6 * base.abs().max().clamp(min=1)
    assert difference[~keeps].max() > 1e-4


@every_family
def test_zero_gate_gives_the_new_expert_the_logit_0(family):
    for logits in scores_of(extend(family, init="zero_gate", num_new_experts=2)):
        assert logits.shape[-1] == NUM_EXPERTS + 2
        assert not logits[..., NUM_EXPERTS:].any()


@every_family
def test_mean_gate_gives_the_new_expert_the_mean_of_the_old_logits(family):
    for logits in scores_of(extend(family, init="mean_gate")):
        torch.testing.assert_close(logits[..., -1], logits[..., :-1].mean(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["copy", "zero_gate", "mean_gate"])
def test_the_scale_of_an_expert_is_copied_whatever_its_row_is_so_that_it_learns_at_once(init):
    if "gemma4" not in BY_NAME:
        pytest.skip("transformers does not have the family yet")
    base = BY_NAME["gemma4"].build()
    for layer in base.model.layers:
        layer.router.per_expert_scale.data = torch.tensor([0.5, 2.0, 3.0, 4.0])
    adapted = get_peft_model(base, config_for(BY_NAME["gemma4"], init=init))
    assert all(router.moextend_gate["default"].per_expert_scale == 2.0 for router in routers_of(adapted))
    adapted(**moe_batch()).loss.backward()
    experts = [module for module in adapted.modules() if isinstance(module, MoExtendExperts)]
    assert len(experts) == 3
    assert all(layer.moextend_experts["default"].down_proj.grad.any() for layer in experts)


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@every_family
def test_experts_implementations_agree(family):
    adapted = extend(family, shake=0.1)
    expected = logits_of(adapted)
    model = adapted.base_model.model
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        assert all(
            module.moextend_experts["default"].config._experts_implementation == implementation
            for module in model.modules()
            if isinstance(module, MoExtendExperts)
        )
        torch.testing.assert_close(logits_of(adapted), expected, rtol=1e-5, atol=2e-5, msg=implementation)


def gradients_of(model: nn.Module, **inputs) -> dict[str, torch.Tensor | None]:
    """Of everything that trains, for the batch."""
    model.zero_grad()
    model(**{**moe_batch(), **inputs}).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("expert_type", ["ffn", "lora"])
def test_gradients_of_experts_implementations_agree(name, expert_type):
    adapted = extend(BY_NAME[name], shake=0.1, expert_type=expert_type, num_new_experts=2).train()
    found = {}
    for implementation in IMPLEMENTATIONS:
        adapted.base_model.model.set_experts_implementation(implementation)
        found[implementation] = gradients_of(adapted)
    assert any(gradient.any() for key, gradient in found["eager"].items() if "moextend_experts" in key)
    for implementation in IMPLEMENTATIONS[1:]:
        for key, expected in found["eager"].items():
            torch.testing.assert_close(found[implementation][key], expected, rtol=1e-4, atol=1e-5, msg=key)


@every_family
def test_router_logits_are_refused_by_the_head_and_returned_by_the_backbone(family):
    counts = {layer: 1 + position for position, layer in enumerate(family.moe_layers)}
    adapted = extend(family, num_new_experts=counts, router_aux_loss_coef=0.1)
    for config in (None, adapted.config.get_text_config()):
        if config is not None:
            config.output_router_logits = True
        with pytest.raises(ValueError, match="was asked for router logits.*get_aux_loss.model.*backbone without the head"):
            adapted(**moe_batch(), **({} if config is not None else {"output_router_logits": True}))
    assert adapted(**moe_batch(), output_router_logits=False).loss.isfinite()
    inputs = {name: tensor for name, tensor in moe_batch().items() if name != "labels"}
    asked = adapted.base_model.model.base_model(**inputs, output_router_logits=True)
    widths = [logits.shape[-1] for logits in getattr(asked, "router_logits", None) or ()]
    assert widths in ([], [NUM_EXPERTS + count for count in counts.values()])
    with adapted.disable_adapter(), torch.no_grad():
        base = adapted(**moe_batch(), output_router_logits=True)
    assert all(logits.shape[-1] == NUM_EXPERTS for logits in getattr(base, "router_logits", None) or ())


@every_family
def test_generation_with_a_cache_is_generation_without(family):
    adapted = extend(family, shake=0.05)
    prompt = {"input_ids": moe_batch()["input_ids"], "attention_mask": moe_batch()["attention_mask"]}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = adapted.generate(**prompt, **settings, use_cache=True)
        expected = adapted.generate(**prompt, **settings, use_cache=False)
    assert torch.equal(found, expected)


def test_a_source_at_rank_1_changes_tokens_under_copy_and_not_under_copy_guarded():
    family = BY_NAME["mixtral"]
    router = extend(family, layers=[0], copy_sources={0: 1})
    weight = routers_of(router)[0].base_layer.weight.data
    x = weight[1] * 3  # best expert: 1
    for init, is_changed in (("copy", True), ("copy_guarded", False)):
        adapted = extend(family, layers=[0], copy_sources={0: 1}, init=init)
        layer = routers_of(adapted)[0]
        index = layer(x[None])[2]
        expected = layer.base_layer(x[None])[2]
        assert expected[0, 0] == 1
        assert torch.equal(index.sort().values, expected.sort().values) is not is_changed
