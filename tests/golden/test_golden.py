"""What users and checkpoints depend on is written down here, so that a change of it shows in the diff.

After a change on purpose: `UPDATE_GOLDEN=1 python -m pytest tests/golden`, and a line under *Checkpoints* in the
changelog.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft import get_peft_model

import peft_moe
from peft_moe import InstructionClusterer, MoCLEConfig, MoExtendConfig, MoLEConfig
from tiny_models import tiny_llama
from tiny_moe import FAMILIES


FOLDER = Path(__file__).parent


def compare(name: str, found) -> None:
    """Compare with the golden file, or write it where `UPDATE_GOLDEN` is set."""
    path = FOLDER / f"{name}.json"
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.is_file(), f"{path.name} is missing: run UPDATE_GOLDEN=1 python -m pytest tests/golden"
    assert json.loads(text) == json.loads(path.read_text()), (
        f"{path.name} differs. If that is on purpose, run UPDATE_GOLDEN=1 python -m pytest tests/golden and say in "
        "the changelog what happens to saved adapters."
    )


CLUSTERER = InstructionClusterer(torch.eye(3, 5), encoder="some/encoder", template="Question: {}")

MODELS = {
    "mole": lambda: get_peft_model(tiny_llama(num_hidden_layers=1), MoLEConfig(r=2, task_type="CAUSAL_LM")),
    "mole_module_scope": lambda: get_peft_model(
        tiny_llama(num_hidden_layers=1),
        MoLEConfig(r=2, router_scope="module", router_bias=False, lora_target_modules=None, task_type="CAUSAL_LM"),
    ),
    "mocle": lambda: get_peft_model(
        tiny_llama(num_hidden_layers=2), MoCLEConfig.from_clusterer(CLUSTERER, r=2, task_type="CAUSAL_LM")
    ),
    "mocle_released_code": lambda: get_peft_model(
        tiny_llama(num_hidden_layers=1), MoCLEConfig.released_code(num_clusters=3, r=2, task_type="CAUSAL_LM")
    ),
    "moextend": lambda: get_peft_model(
        FAMILIES[0].build(num_hidden_layers=2),
        MoExtendConfig(num_new_experts={1: 2}, copy_sources={1: 3}, calibration="paper", task_type="CAUSAL_LM"),
    ),
    "moextend_low_rank": lambda: get_peft_model(
        FAMILIES[0].build(num_hidden_layers=1),
        MoExtendConfig(copy_sources={0: 0}, init="copy_guarded", expert_type="lora", r=2, task_type="CAUSAL_LM"),
    ),
}
CONFIGS = {
    "mole": lambda: MoLEConfig(target_modules=["up_proj"], lora_target_modules=["q_proj"]),
    "mocle": lambda: MoCLEConfig.from_clusterer(CLUSTERER, target_modules=["up_proj"]),
    "moextend": lambda: MoExtendConfig(num_new_experts={3: 1}, copy_sources={3: 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_a_saved_adapter(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    compare(f"{name}_tensors", {key: f"{list(t.shape)} {str(t.dtype)[6:]}" for key, t in tensors.items()})


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_of_a_saved_config(name, tmp_path):
    CONFIGS[name]().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    # what PEFT itself adds is PEFT's business, and differs from version to version
    of_peft = {field.name for field in dataclasses.fields(peft.PeftConfig)} - {"peft_type"}
    compare(f"{name}_config", {key: value for key, value in saved.items() if key not in of_peft})


def test_public_names():
    names = {"peft_moe": sorted(peft_moe.__all__)}
    for module in ("routing", "kernels", "monitoring", "tuners"):
        names[f"peft_moe.{module}"] = sorted(getattr(peft_moe, module).__all__)
    compare("public_names", names)
