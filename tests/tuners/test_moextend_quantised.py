"""Quantised base models: attention and shared experts are quantised, stacked experts and plain routers are not.

Training, saving and checkpointing are in `tests/conformance/test_tuner_quantised.py`.
"""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from peft import get_peft_model
from test_moextend_families import BY_NAME, config_for, logits_of, shaken
from transformers import AutoModelForCausalLM

from peft_moe.tuners.moextend.model import is_quantised


# what the CPU kernel of nf4 can divide
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def nf4(*skipped: str):
    return bitsandbytes(skipped, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8(*skipped: str):
    return bitsandbytes(skipped, load_in_8bit=True)


def bitsandbytes(skipped: tuple[str, ...], **settings):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'peft_moe[quantization]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings, **({"llm_int8_skip_modules": ["lm_head", *skipped]} if skipped else {}))


def torchao_int8(*skipped: str):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install 'peft_moe[quantization]'")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = {"modules_to_not_convert": ["lm_head", *skipped]} if skipped else {}
    return TorchAoConfig(Int8WeightOnlyConfig(version=2), **settings)


KINDS = {"nf4": nf4, "int8": int8, "torchao-int8": torchao_int8}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(name, kind, folder, *skipped):
    """The model of a family, quantised but for the modules of these patterns."""
    config = KINDS[kind](*skipped)
    if not hasattr(BY_NAME.get(name), "build"):
        pytest.skip(f"{name} is not in this version of transformers")
    if not (folder / "config.json").exists():
        BY_NAME[name].build(**SIZES).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


@every_kind
def test_stacked_experts_and_routers_are_left_as_they_are(kind, tmp_path):
    model = quantised("mixtral", kind, tmp_path)
    plain = BY_NAME["mixtral"].build(**SIZES)
    mixtures = {name: parameter for name, parameter in model.named_parameters() if ".mlp." in name}
    assert len(mixtures) == 9
    for name, parameter in mixtures.items():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert is_quantised(model.model.layers[0].self_attn.q_proj.weight)


@every_kind
def test_a_merged_model_is_quantised_as_before_and_computes_the_same(kind, tmp_path):
    model = get_peft_model(quantised("mixtral", kind, tmp_path / "base"), config_for(BY_NAME["mixtral"])).eval()
    shaken(model, 0.1)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": "cpu"}).eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-5, atol=1e-5)
    assert is_quantised(loaded.model.layers[0].self_attn.q_proj.weight)


@every_kind
@pytest.mark.parametrize(("name", "linear"), [("afmoe", "gate"), ("hunyuan_v1_moe", "wg")], ids=["afmoe", "hunyuan"])
def test_a_router_made_of_a_linear_is_refused_unless_it_is_left_out(name, linear, kind, tmp_path):
    settings = config_for(BY_NAME[name]) if name in BY_NAME else None
    model = quantised(name, kind, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)(is quantised|has not exactly one matrix).*modules_to_not_convert"):
        get_peft_model(model, settings)
    model = quantised(name, kind, tmp_path, rf".*\.{linear}")
    get_peft_model(model, settings)(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
