"""A saved adapter comes back to the bit on every path of PEFT; merging gives a plain, larger model of the family."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
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

from peft_moe.tuners.moextend.layer import MoExtendLayer
from tiny_moe import NUM_EXPERTS, MoeFamily, image_batch, moe_batch, tiny_moe_llava


MIXTRAL = BY_NAME["mixtral"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@every_family
def test_a_saved_adapter_comes_back_to_the_bit(family: MoeFamily, tmp_path):
    counts = {layer: 1 + position for position, layer in enumerate(family.moe_layers)}
    model = extend(family, shake=0.1, num_new_experts=counts, calibration="paper", init="copy_guarded")
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all("moextend_" in key for key in keys)
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "renamed"}):
        loaded = PeftModel.from_pretrained(family.build(), tmp_path, **settings).eval()
        assert_same(logits_of(loaded), expected, family)
        own = {name: tensor for name, tensor in model.state_dict().items() if "moextend_" in name}
        for name, tensor in loaded.state_dict().items():
            if "moextend_" in name:
                assert torch.equal(tensor, own[name.replace(".renamed.", ".default.")]), (settings, name)
    plain = family.build()
    plain.load_adapter(str(tmp_path))
    assert_same(logits_of(plain), expected, family)


def test_a_low_rank_adapter_is_small_and_comes_back_to_the_bit(tmp_path):
    sizes = {}
    for expert_type in ("ffn", "lora"):
        model = extend(MIXTRAL, shake=0.1, expert_type=expert_type, r=2)
        model.save_pretrained(tmp_path / expert_type)
        sizes[expert_type] = (tmp_path / expert_type / "adapter_model.safetensors").stat().st_size
        loaded = PeftModel.from_pretrained(MIXTRAL.build(), tmp_path / expert_type, low_cpu_mem_usage=True).eval()
        assert torch.equal(logits_of(loaded), logits_of(model))
    assert sizes["lora"] < sizes["ffn"]


@pytest.mark.slow
def test_a_fresh_process_loads_it_to_the_bit(tmp_path):
    model = extend(MIXTRAL, shake=0.1, calibration="released_code")
    model.save_pretrained(tmp_path)
    torch.save(logits_of(model), tmp_path / "logits.pt")
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import torch; torch.set_num_threads(1)
from test_moextend_families import MoExtendConfig, logits_of
from peft import PeftModel
from tiny_moe import BY_NAME
model = PeftModel.from_pretrained(BY_NAME["mixtral"].build(), {str(tmp_path)!r}).eval()
assert torch.equal(logits_of(model), torch.load({str(tmp_path / "logits.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_configuration_survives_json(tmp_path):
    config = config_for(MIXTRAL, num_new_experts={0: 1, 2: 2}, copy_sources={0: 3, 2: [1, 0]})
    get_peft_model(MIXTRAL.build(), config).save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.num_new_experts == {0: 1, 2: 2}
    assert loaded.copy_sources == {0: 3, 2: [1, 0]}
    assert loaded.base_num_experts == {0: NUM_EXPERTS, 2: NUM_EXPERTS}


def test_another_base_model_is_refused(tmp_path):
    extend(MIXTRAL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for a base model with these experts per layer.*has {0: 8, 1: 8, 2: 8}"):
        PeftModel.from_pretrained(MIXTRAL.build(num_local_experts=8), tmp_path)


def test_an_incomplete_file_is_refused(tmp_path):
    extend(MIXTRAL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "calibration": "paper"}))
    with pytest.raises(ValueError, match="6 tensors are missing from the file.*Nothing was loaded"):
        PeftModel.from_pretrained(MIXTRAL.build(), tmp_path)


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
    "layers that differ": ({"num_new_experts": {0: 1, 1: 2, 2: 1}}, "layers differ in their new experts"),
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


def test_our_own_moe_llava_is_extended_and_merged(tmp_path):
    batch = image_batch()
    with torch.no_grad():
        expected = tiny_moe_llava()(**batch).logits
        model = get_peft_model(tiny_moe_llava(), config_for(MIXTRAL, copy_sources=None, calibration="paper")).eval()
        assert len(routers_of(model)) == len(model.peft_config["default"].base_num_experts) > 0
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
        shaken(model, 0.1)
        found = model(**batch).logits
        assert not torch.equal(found, expected)
        assert model(**batch, output_router_logits=True).logits.equal(found)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny_moe_llava(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, found)
        model = get_peft_model(tiny_moe_llava(), config_for(MIXTRAL, copy_sources=None)).eval()
        shaken(model, 0.1)
        found = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, found, rtol=1e-5, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**batch).logits, found, rtol=1e-5, atol=1e-5)
