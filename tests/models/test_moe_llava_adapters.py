"""What stages and adapters have trained on a MoeLlava comes back to the bit in a process that starts anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models.tiny_llava import image_batch, labels_of, run_python, sparse_llava, tiny_llava, train
from peft_moe import MoeTuningStage, MoLEConfig


# names alone fit the vision tower too
TEXT_ATTENTION = r".*language_model.*self_attn\.(q|k|v|o)_proj"
ADAPTERS = {
    "lora": lambda **fields: LoraConfig(**{"r": 4, "target_modules": TEXT_ATTENTION, **fields}),
    "mole": lambda **fields: MoLEConfig(**{"r": 4, "num_experts": 2, "target_modules": TEXT_ATTENTION, **fields}),
}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**image_batch(num_padding=2)).logits


LOAD = """
import json, sys
import torch
import peft_moe
from peft import PeftModel
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(job["model"])
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        logits = model.eval()(**torch.load(job["batch"])).logits
    torch.save({"logits": logits, "class": type(model).__name__}, job["result"])
"""


def trained_stage(name: str, root: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    model = tiny_llava() if name == "II-dense" else sparse_llava(expert_noise=0.5)
    before = logits_of(model)
    MoeTuningStage(name.partition("-")[0]).apply(model)
    train(model, root).save_model(str(root / "model"))
    return before, logits_of(model), {"model": str(root / "model"), "adapter": None}


def trained_adapter(name: str, root: Path) -> tuple[torch.Tensor, torch.Tensor, dict]:
    model = sparse_llava(expert_noise=0.5)
    model.save_pretrained(root / "base")
    before = logits_of(model)
    names = MoeTuningStage("III").modules_to_save(model)
    model = get_peft_model(model, ADAPTERS[name](modules_to_save=names))
    MoeTuningStage("III").apply(model)
    train(model, root).save_model(str(root / "adapter"))
    return before, logits_of(model), {"model": str(root / "base"), "adapter": str(root / "adapter")}


STAGES, KINDS = ["I", "II", "II-dense", "III"], list(ADAPTERS)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor, dict]]:
    """Trains every case here and loads all of them in one fresh process: logits before, after, and of that process."""
    root = tmp_path_factory.mktemp("trained")
    torch.save(image_batch(num_padding=2), root / "batch.pt")
    jobs, known = [], {}
    for name in STAGES + KINDS:
        folder = root / name
        folder.mkdir()
        before, after, job = (trained_adapter if name in ADAPTERS else trained_stage)(name, folder)
        jobs.append({**job, "batch": str(root / "batch.pt"), "result": str(folder / "result.pt")})
        known[name] = (before, after)
    run_python("-c", LOAD, json.dumps(jobs))
    return {name: (*known[name], torch.load(root / name / "result.pt")) for name in known}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES + KINDS)
def test_training_comes_back_to_the_bit_in_a_fresh_process(results, name):
    before, after, found = results[name]
    assert not torch.equal(before, after)
    assert torch.equal(found["logits"], after)
    if name in STAGES:
        expected = "LlavaForConditionalGeneration" if name == "II-dense" else "MoeLlavaForConditionalGeneration"
        assert found["class"] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param({"target_modules": TEXT_ATTENTION}, id="regex"),
        pytest.param(
            {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "exclude_modules": r".*vision_tower.*"},
            id="exclude_modules",
        ),
    ],
)
def test_both_ways_to_name_the_text_attention_spare_the_vision_tower(kind, target):
    model = get_peft_model(sparse_llava(), ADAPTERS[kind](**target))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("self_attn.")[0] for name in trained} == {
        f"base_model.model.model.language_model.layers.{layer}." for layer in range(3)
    }
    assert {name.split("self_attn.")[1].split(".")[0] for name in trained} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    loss = model.train()(**image_batch(), labels=labels_of(image_batch())).loss
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_mole_on_names_that_the_vision_tower_has_too_names_it_in_the_error():
    model = get_peft_model(sparse_llava(), ADAPTERS["mole"](target_modules=["q_proj", "k_proj", "v_proj"]))
    with pytest.raises(RuntimeError, match=r"'model\.vision_tower\.\S+\.q_proj' follows the router of .*router_scope"):
        model(**image_batch())


def test_mole_with_a_router_for_each_linear_may_have_the_vision_tower():
    config = ADAPTERS["mole"](target_modules=["q_proj", "k_proj", "v_proj"], router_scope="module")
    model = get_peft_model(sparse_llava(), config)
    assert torch.isfinite(logits_of(model)).all()
    assert any("vision_tower" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_mole_by_default_routes_the_dense_mlps_and_spares_mixtures_and_vision_tower():
    model = get_peft_model(sparse_llava(), MoLEConfig(r=4, num_experts=2))
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    routed = {name.split(".mlp.")[0] for name in adapted if "mole_router" in name}
    assert routed == {"base_model.model.model.language_model.layers.1"}
    assert not any("vision_tower" in name or ".experts." in name for name in adapted)
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_of_lora_changes_nothing_and_can_be_switched_off(kind):
    model = sparse_llava()
    expected = logits_of(model)
    adapted = get_peft_model(model, ADAPTERS[kind]())
    assert isinstance(adapted, PeftModel)
    assert torch.equal(logits_of(adapted), expected)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "_B." in name:
                parameter.normal_()
    assert not torch.equal(logits_of(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_generate_with_a_cache_what_they_generate_without(kind):
    torch.manual_seed(1)
    fields = {"init_lora_weights": False}
    model = get_peft_model(sparse_llava(), ADAPTERS[kind](**fields)).eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = image_batch(num_padding=2)
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
