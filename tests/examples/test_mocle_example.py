"""The MoCLE examples run from end to end in a small form: a tiny model with a real tokenizer, and real MiniLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from running import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe import attach_encoder
from pretrained import minilm_path


pytestmark = pytest.mark.slow


def run_small(script: str, model: Path, output: Path, *extra: str) -> str:
    size = ["--rows", "8", "--eval_rows", "2", "--num_clusters", "4"]
    return run(f"mocle/{script}", "--model_name_or_path", model, "--output_dir", output, *size, *extra).stdout


def test_training_leaves_an_adapter_that_routes_by_itself(tiny_model, tmp_path):
    text = run_small("train.py", tiny_model, tmp_path, "--max_steps", "4")
    assert "adjusted Rand index" in text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path).eval()
    attach_encoder(model, str(minilm_path()))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer("Is the sky blue?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_comparison_reports_every_arm_and_goes_on_where_it_stopped(tiny_model, tmp_path):
    settings = ["--steps", "2", "--batch_size", "2", "--arms", "mocle"]
    run_small("compare.py", tiny_model, tmp_path, *settings)
    first = json.loads((tmp_path / "report.json").read_text())["runs"]["mocle/0"]
    text = run_small("compare.py", tiny_model, tmp_path, *settings, "lora_equal_parameters", "mocle_without_universal")
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert runs["mocle/0"] == first and len(runs) == 3
    assert 0 <= first["information_about_the_domain"] <= 2
    parameters = {name: found["trainable_parameters"] for name, found in runs.items()}
    assert 0 < parameters["mocle/0"] - parameters["lora_equal_parameters/0"] < 10_000
    assert all(f"| {name.partition('/')[0]} (1) |" in text for name in runs)
