"""A saved adapter comes back to the bit on every path of PEFT."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_moextend_families import BY_NAME, assert_same, config_for, every_family, extend, extend_llava, logits_of

from tiny_moe import NUM_EXPERTS, MoeFamily, image_batch


MIXTRAL = BY_NAME["mixtral"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@every_family
def test_a_saved_adapter_comes_back_to_the_bit(family: MoeFamily, tmp_path):
    counts = {layer: 1 + position for position, layer in enumerate(family.moe_layers)}
    init = "copy_guarded" if family.is_linear else "mean_gate"
    model = extend(family, shake=0.1, num_new_experts=counts, calibration="paper", init=init)
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
def test_a_fresh_process_loads_every_family_to_the_bit(tmp_path):
    families = [family for family in BY_NAME.values() if not family.is_further]
    for family in families:
        counts = {layer: 1 + position for position, layer in enumerate(family.moe_layers)}
        model = extend(family, shake=0.1, num_new_experts=counts, calibration="paper")
        model.save_pretrained(tmp_path / family.name)
        torch.save(logits_of(model), tmp_path / family.name / "logits.pt")
    llava = extend_llava(shake=0.1, num_new_experts={0: 1, 2: 2}, calibration="released_code")
    llava.save_pretrained(tmp_path / "moe_llava")
    torch.save(logits_of(llava, **image_batch()), tmp_path / "moe_llava/logits.pt")
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
import torch; torch.set_num_threads(1)
import peft_moe
from peft import PeftModel
from test_moextend_families import assert_same, logits_of
from tiny_moe import BY_NAME, image_batch, tiny_moe_llava
for folder in Path({str(tmp_path)!r}).iterdir():
    family = BY_NAME.get(folder.name)
    base, batch = (tiny_moe_llava(), image_batch()) if family is None else (family.build(), {{}})
    found = logits_of(PeftModel.from_pretrained(base, folder).eval(), **batch)
    assert_same(found, torch.load(folder / "logits.pt"), BY_NAME["mixtral"] if family is None else family)
    print(folder.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == sorted(["moe_llava", *(family.name for family in families)])


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


def test_absent_sources_are_announced_for_new_experts_and_not_for_loaded_ones(tmp_path):
    with pytest.warns(UserWarning, match="begin as copies of expert 0"):
        get_peft_model(MIXTRAL.build(), config_for(MIXTRAL, copy_sources=None)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*copies of expert 0")
        PeftModel.from_pretrained(MIXTRAL.build(), tmp_path, is_trainable=True)
