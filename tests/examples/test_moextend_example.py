"""The MoExtend examples run from end to end in their small setting, on text and on pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from running import EXAMPLES, run
from transformers import AutoModelForCausalLM

from peft_moe import ExtenderReport


pytestmark = pytest.mark.slow
train, extend_images = (partial(run, f"moextend/{name}.py") for name in ("train", "image"))
SIZE = ["--small", "--base_steps", "3", "--extender_steps", "2", "--steps", "2", "--rows", "16", "--eval_rows", "2"]
IMAGE_SIZE = ["--small", "--share_of_steps", "0.05", "--align_steps", "2", "--extender_steps", "2", "--steps", "2"]
IMAGE_SIZE += ["--probe", "16", "--eval_questions", "16", "--batch_size", "8"]


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("moextend") / "run"
    train(*SIZE, "--output_dir", output, "--arms", "moextend_extender", "full")
    return output


def test_the_arms_of_the_extender_follow_its_report(finished):
    report = read(finished)
    found = ExtenderReport.from_dict(report["extender"])
    assert report["moextend_extender/0"]["layers"] == sorted(found.ranking[:2])
    assert report["moextend_extender/0"]["trained_parameters"] < 0.05 * report["full/0"]["trained_parameters"]
    assert all(value > 0 for name, run in report.items() if "/" in name for value in run["losses"])
    assert (finished / "shift.png").read_bytes().startswith(b"\x89PNG")
    assert "| moextend_extender/0 |" in (finished / "report.md").read_text()


def test_the_base_model_is_left_alone(finished):
    base = AutoModelForCausalLM.from_pretrained(finished / "base")
    assert type(base).__name__ == "MixtralForCausalLM"
    experts = base.model.layers[0].mlp.experts.down_proj
    assert experts.shape[0] == 4 and not experts[0].equal(experts[1])


def test_an_interrupted_comparison_goes_on(finished):
    before = read(finished)
    arms = ["moextend_extender", "moextend_first_half", "moextend_interval", "lora_experts"]
    printed = train(*SIZE, "--output_dir", finished, "--arms", *arms).stdout
    assert "base is finished" in printed and "moextend_extender/0 is finished" in printed
    after = read(finished)
    assert {name: after[name] for name in before} == before
    assert after["moextend_first_half/0"]["layers"] == [0, 1]
    assert after["moextend_interval/0"]["layers"] == [0, 2]
    assert all(f"| {arm}/0 |" in printed for arm in [*arms, "full"])
    refused = train(*SIZE, "--num_experts", 3, "--output_dir", finished, check=False)
    assert refused.returncode != 0 and "use --restart" in refused.stderr


def test_upcycling_without_noise_computes_what_the_dense_model_does():
    script = f"""
import sys
sys.argv = ["train"]
sys.path.insert(0, {str(EXAMPLES / "moextend")!r})
import torch
from train import upcycle
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5e4,
    initializer_range=0.2)).eval()
ids = torch.randint(3, 64, (2, 9))
sparse = upcycle(dense, num_experts=4, expert_noise=0.0).eval()
torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
noisy = upcycle(dense, num_experts=4, expert_noise=0.5).eval()
assert not torch.allclose(noisy(ids).logits, dense(ids).logits, atol=1e-2)
"""
    run("-c", script)


@pytest.mark.exhaustive
def test_pictures_are_extended_too(tmp_path):
    output = tmp_path / "run"
    arms = ["--arms", "moextend_extender", "lora_experts", "full"]
    printed = extend_images(*IMAGE_SIZE, "--output_dir", output, *arms).stdout
    report = read(output)
    found = ExtenderReport.from_dict(report["extender"])
    assert list(found.before) == [0, 1, 2, 3]
    assert report["moextend_extender/0"]["layers"] == sorted(found.ranking[:2])
    for name in ("base", "moextend_extender/0", "lora_experts/0", "full/0"):
        assert all(0 <= report[name][f"vqa_accuracy_{side}"] <= 100 for side in ("old", "new"))
    # the projector trains in every arm
    assert report["lora_experts/0"]["trained_parameters"] > 33_024
    assert "moextend_extender/0 |" in printed
    again = extend_images(*IMAGE_SIZE, "--output_dir", output, *arms).stdout
    assert "full/0 is finished" in again and "Training the vision tower" not in again
