"""Merging gives a plain, larger model of the family; pads fill up layers with fewer new experts and change nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_moextend_families import (
    BY_NAME,
    assert_same,
    config_for,
    every_family,
    extend,
    logits_of,
    new_name,
    routers_of,
    shaken,
)
from torch import nn

from peft_moe.foreign_moe import find_moe_blocks
from peft_moe.tuners.moextend.layer import MoExtendLayer
from tiny_moe import NUM_EXPERTS, MoeFamily, image_batch, moe_batch, tiny_moe_llava


MIXTRAL = BY_NAME["mixtral"]
EXACT = ("gpt_oss", "deepseek_v3", "glm4_moe", "nemotron_h", "minimax_m2", "afmoe", "dots1", "lfm2_moe", "solar_open",
         "exaone_moe", "glm4_moe_lite", "hy_v3")  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def has_no_trace(model: nn.Module) -> bool:
    """Whether nothing of the tuner is left."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    is_clean = not any(type(hook).__module__.startswith("peft_moe") for hook in hooks)
    return is_clean and not any(isinstance(module, MoExtendLayer) for module in model.modules())


@every_family
def test_unload_gives_the_base_model_back(family: MoeFamily):
    base = family.build()
    expected, classes = logits_of(base), [type(module) for module in base.modules()]
    model = get_peft_model(base, config_for(family)).unload()
    assert has_no_trace(model)
    assert [type(module) for module in model.modules()] == classes
    assert_same(logits_of(model), expected, family)


@every_family
def test_a_merged_model_is_plain_and_loads_to_the_bit(family: MoeFamily, tmp_path):
    model = extend(family, shake=0.1, num_new_experts=2)
    expected = logits_of(model)
    own = {name: tensor.clone() for name, tensor in model.base_model.model.state_dict().items()}
    merged = model.merge_and_unload()
    assert has_no_trace(merged)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=2e-5)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval().requires_grad_(False)
    assert_same(logits_of(loaded), logits_of(merged), family)
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in own.items() if "moextend_" not in name}
    for name, tensor in loaded.state_dict().items():
        old, new = plain[name], own.get(new_name(name, own))
        axis = 0 if old.shape == tensor.shape else next(i for i, n in enumerate(old.shape) if n != tensor.shape[i])
        assert torch.equal(tensor, old if old.shape == tensor.shape else torch.cat([old, new], dim=axis)), name
    asked = loaded(**moe_batch(), output_router_logits=True)
    assert all(logits.shape[-1] == NUM_EXPERTS + 2 for logits in getattr(asked, "router_logits", None) or ())


def test_a_merged_low_rank_adapter_computes_the_same():
    model = extend(MIXTRAL, shake=0.1, expert_type="lora")
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_an_offset_is_merged_into_the_bias_of_a_router_that_has_one():
    model = extend(BY_NAME["gpt_oss"], shake=0.1, init="copy_guarded", guard_offset=-0.5)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-5, atol=2e-5)


REFUSALS = {
    "layers that differ": ({"num_new_experts": {0: 1, 1: 2, 2: 1}}, r"layers differ in their new.*pad_experts=True"),
    "layers left out": ({"layers": [0, 1]}, r"layers differ in their new experts \({0: 1, 1: 1, 2: 0}\)"),
    "a trained calibration": ({"calibration": "paper"}, "layer 0 has a trained calibration"),
    "an offset": ({"init": "copy_guarded"}, "layer 0 has an offset of copy_guarded"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_no_plain_model_can_hold_is_not_merged(settings, message):
    layers = settings.get("layers", [0, 1, 2])
    model = extend(MIXTRAL, shake=0.1, copy_sources=dict.fromkeys(layers, 1), **settings)
    expected = logits_of(model)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged in place. Use merge_and_unload"):
        model.merge_adapter()
    assert torch.equal(logits_of(model), expected)


def test_a_calibration_that_is_still_zero_does_not_hinder_merging():
    model = extend(MIXTRAL, calibration="released_code")
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_our_own_moe_llava_is_merged(tmp_path):
    batch = image_batch()
    model = get_peft_model(tiny_moe_llava(), config_for(MIXTRAL, copy_sources=None)).eval()
    assert len(routers_of(model)) == len(model.peft_config["default"].base_num_experts) > 0
    shaken(model, 0.1)
    found = logits_of(model, **batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, **batch), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(reloaded(merged, tmp_path), **batch), found, rtol=1e-5, atol=1e-5)


def reloaded(merged: nn.Module, folder) -> nn.Module:
    """Saved and loaded; copied, because sums depend on where in memory a file happens to be mapped."""
    merged.save_pretrained(folder)
    loaded = type(merged).from_pretrained(folder).eval().requires_grad_(False)
    return copy.deepcopy(loaded)


def extend_layers(family: MoeFamily, *layers: int, **settings) -> PeftModel:
    """One new expert in these layers only."""
    return extend(family, layers=list(layers), copy_sources=dict.fromkeys(layers, 1), **settings)


def chosen_by(merged: nn.Module, batch: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Layer → which experts the routers of a plain model choose."""
    found, hooks = {}, []
    for layer, block in find_moe_blocks(merged)[0].items():

        def keep(module, args, output, layer=layer):
            found[layer] = next(entry for entry in output if not entry.is_floating_point())

        hooks.append(merged.get_submodule(block.router).register_forward_hook(keep))
    with torch.no_grad():
        merged(**batch)
    for hook in hooks:
        hook.remove()
    return found


COUNTS = {
    "unequal": lambda family: {"num_new_experts": {layer: 1 + i for i, layer in enumerate(family.moe_layers)}},
    "left out": lambda family: {"layers": list(family.moe_layers[:-1])},
}


@every_family
@pytest.mark.parametrize("kind", COUNTS)
def test_pads_change_nothing_and_the_model_is_plain(family: MoeFamily, kind, tmp_path):
    settings = COUNTS[kind](family)
    layers = settings.get("layers", family.moe_layers)
    model = extend(family, shake=0.1, copy_sources=dict.fromkeys(layers, 1), **settings)
    expected, other = logits_of(model), logits_of(model, **moe_batch(seed=9))
    if family.name not in EXACT:
        with pytest.raises(ValueError, match="add nothing to the logit.*Give all layers the same number"):
            model.merge_and_unload(pad_experts=True)
        assert torch.equal(logits_of(model), expected)
        return
    merged = model.merge_and_unload(pad_experts=True)
    assert has_no_trace(merged)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits_of(merged, **moe_batch(seed=9)), other, rtol=1e-5, atol=2e-5)
    assert all(tensor.isfinite().all() for tensor in merged.state_dict().values())
    loaded = reloaded(merged, tmp_path)
    assert_same(logits_of(loaded), logits_of(merged), family)
    top = max(settings["num_new_experts"].values()) if "num_new_experts" in settings else 1
    assert {block.num_experts for block in find_moe_blocks(loaded)[0].values()} == {NUM_EXPERTS + top}
    asked = loaded(**moe_batch(), output_router_logits=True)
    widths = {logits.shape[-1] for logits in getattr(asked, "router_logits", None) or ()}
    assert widths <= {NUM_EXPERTS + top} and asked.loss.isfinite()


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_pads_are_out_of_reach(name):
    family = BY_NAME[name]
    model = extend_layers(family, 0, 2, shake=0.1)
    merged = model.merge_and_unload(pad_experts=True)
    assert not (chosen_by(merged, moe_batch())[1] >= NUM_EXPERTS).any()
    logits = merged(**moe_batch(), output_router_logits=True).router_logits
    if name != "deepseek_v3":
        probability = logits[1].float().softmax(dim=-1)
        assert probability[..., -1].max() < 1e-12 and probability[..., :-1].min() > 0
    experts = merged.get_submodule(find_moe_blocks(merged)[0][1].experts)
    assert not any(parameter[-1].any() for parameter in experts.parameters(recurse=False))


def test_a_correction_of_softmax_probabilities_is_no_way_to_pad_exactly():
    family = BY_NAME["ernie4_5_moe"]
    model = extend_layers(family, 0, 1)
    with pytest.raises(ValueError, match="layers.2.mlp.gate add nothing"):
        model.merge_and_unload(pad_experts=True)


def test_a_pad_that_only_rare_inputs_would_choose_is_refused():
    family = BY_NAME["qwen3_moe"]
    family = replace(family, settings={**family.settings, "num_experts": 128, "num_experts_per_tok": 2})
    with pytest.raises(ValueError, match="a pad would be chosen for some inputs"):
        extend_layers(family, 0).merge_and_unload(pad_experts=True)


def test_pads_of_a_router_with_groups_leave_every_expert_in_its_group(tmp_path):
    family = BY_NAME["deepseek_v3"]
    groups = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    family = replace(family, settings={**family.settings, **groups})
    model = extend(family, shake=0.1, num_new_experts={0: 2, 1: 4}, copy_sources={0: 1, 1: 5})
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    expected = logits_of(model)
    merged = model.merge_and_unload(pad_experts=True)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=2e-5)
    chosen = chosen_by(merged, moe_batch())
    pads = {0: (5, 11), 1: (), 2: (4, 5, 10, 11)}
    assert all(not torch.isin(chosen[layer], torch.tensor(places)).any() for layer, places in pads.items() if places)
    assert (chosen[2] > 5).any() and (chosen[2] < 4).any()
    assert torch.equal(logits_of(reloaded(merged, tmp_path)), logits_of(merged))


def test_a_router_that_chooses_one_expert_with_weight_1_is_padded_by_copies():
    family = replace(MIXTRAL, settings={**MIXTRAL.settings, "num_experts_per_tok": 1})
    model = extend(family, shake=0.1, num_new_experts={0: 2}, copy_sources={0: 1})
    batches = [moe_batch(), moe_batch(8, 32, seed=5)]
    expected = [logits_of(model, **batch) for batch in batches]
    merged = model.merge_and_unload(pad_experts=True)
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(logits_of(merged, **batch), logits, rtol=1e-5, atol=2e-5)
    gate = merged.model.layers[2].mlp.gate.weight
    assert torch.equal(gate[NUM_EXPERTS:], gate[:1].expand(2, -1))


def test_one_expert_without_a_fixed_weight_is_not_padded_by_copies():
    family = BY_NAME["qwen2_moe"]
    family = replace(family, settings={**family.settings, "num_experts_per_tok": 1})
    with pytest.raises(ValueError, match="add nothing"):
        extend_layers(family, 0, 1).merge_and_unload(pad_experts=True)


def test_batches_to_measure_pads_on_are_refused():
    with pytest.raises(ValueError, match="pad_experts must be True or False, but is list. Pads are exact or refused"):
        extend_layers(MIXTRAL, 0, 1).merge_and_unload(pad_experts=[moe_batch()])


def test_only_what_is_merged_is_padded():
    model = extend_layers(BY_NAME["gpt_oss"], 0, 1, shake=0.1)
    expected = logits_of(model)
    model.add_adapter("other", config_for(BY_NAME["gpt_oss"], num_new_experts={2: 3}, copy_sources={2: 1}))
    model.set_adapter("other")
    merged = model.merge_and_unload(adapter_names=["default"], pad_experts=True)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=2e-5)
    assert merged.config.num_local_experts == NUM_EXPERTS + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pads_are_finite_in_half_precision(dtype):
    model = extend_layers(BY_NAME["gpt_oss"], 0, 2, shake=0.1).to(dtype)
    expected = logits_of(model)
    merged = model.merge_and_unload(pad_experts=True)
    found = logits_of(merged)
    assert found.isfinite().all() and all(tensor.isfinite().all() for tensor in merged.state_dict().values())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_training_a_padded_model_leaves_the_pads_out():
    model = extend_layers(BY_NAME["gpt_oss"], 0, 2, shake=0.1)
    merged = model.merge_and_unload(pad_experts=True).train().requires_grad_(True)
    merged(**moe_batch(), output_router_logits=True).loss.backward()
    layer = merged.model.layers[1].mlp
    assert all(parameter.grad.isfinite().all() for parameter in merged.parameters() if parameter.grad is not None)
    assert not layer.experts.down_proj.grad[-1].any() and not layer.router.weight.grad[-1].any()


def test_moe_llava_with_unequal_counts_merges_without_pads(tmp_path):
    batch = image_batch()
    for number, settings in enumerate(({"num_new_experts": {0: 1, 2: 3}}, {"layers": [2]})):
        model = get_peft_model(tiny_moe_llava(), config_for(MIXTRAL, **settings, copy_sources=None)).eval()
        shaken(model, 0.1)
        with torch.no_grad():
            expected = model(**batch).logits
            merged = model.merge_and_unload()
            assert has_no_trace(merged)
            assert merged.config.num_experts == [[5, 7], [4, 5]][number]
            assert merged.config.text_config.num_experts == merged.config.num_experts
            found = merged(**batch).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            loaded = reloaded(merged, tmp_path / str(number))
            assert torch.equal(loaded(**batch).logits, found)
            assert loaded(**batch, output_router_logits=True).router_logits[-1].shape[-1] == [7, 5][number]


@pytest.mark.slow
def test_a_padded_model_loads_without_the_plugin(tmp_path):
    merged = extend_layers(BY_NAME["gpt_oss"], 0, 1, shake=0.1).merge_and_unload(pad_experts=True)
    merged.save_pretrained(tmp_path)
    torch.save((moe_batch(), logits_of(merged)), tmp_path / "expected.pt")
    script = f"""
import copy, sys, torch; torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
with torch.no_grad():
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
assert "peft_moe" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
