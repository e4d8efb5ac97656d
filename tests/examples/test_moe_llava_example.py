"""The MoE-LLaVA example runs from end to end in its small setting, and its evaluation scores what it wrote."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from running import run
from transformers import AutoModelForImageTextToText

import peft_moe  # noqa: F401


pytestmark = pytest.mark.slow
train, evaluate = (partial(run, f"moe_llava/{name}.py") for name in ("train", "evaluate_vqa"))
SIZE = ["--small", "--share_of_steps", "0.15", "--eval_questions", "32", "--batch_size", "16", "--dense_control"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("moe_llava") / "run"
    train(*SIZE, "--output_dir", output)
    return output


def test_the_loss_falls_and_the_last_stage_trains_experts(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["I"]["trainable"]["experts"] == report["II"]["trainable"]["experts"] == 0
    assert report["I"]["trainable"]["attention"] == report["III"]["trainable"]["attention"] == 0
    assert report["III"]["trainable"]["routers"] > 0
    assert mean(report["II"]["losses"]) < 0.8 * mean(report["I"]["losses"])
    assert mean(report["III"]["losses"]) < mean(report["II"]["losses"])


def test_the_dense_control_goes_on_from_stage_two(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["II_again"]["trainable"] == report["II"]["trainable"]
    assert mean(report["II_again"]["losses"]) < mean(report["II"]["losses"])
    assert type(AutoModelForImageTextToText.from_pretrained(finished / "stage_II_again")).__name__.startswith("Llava")


def test_experts_differ_after_stage_three(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished / "stage_III")
    assert type(model).__name__ == "MoeLlavaForConditionalGeneration"
    weight = model.model.language_model.layers[0].mlp.experts.down_proj
    assert weight.shape[0] == 4
    assert not torch.equal(weight[0], weight[1])


def test_an_interrupted_run_goes_on_after_its_last_finished_stage(finished):
    report_file = finished / "report.json"
    report = json.loads(report_file.read_text())
    report_file.write_text(json.dumps({name: value for name, value in report.items() if name != "III"}))
    printed = train(*SIZE, "--output_dir", finished).stdout
    assert "Stage I is finished" in printed
    assert "Stage II is finished" in printed
    assert json.loads(report_file.read_text())["III"]["losses"] == pytest.approx(report["III"]["losses"], rel=0.5)


@pytest.mark.exhaustive
def test_other_settings_do_not_mix_with_an_earlier_run(finished):
    result = train(*SIZE, "--num_experts", "2", "--output_dir", finished, check=False)
    assert result.returncode != 0
    assert "use --restart" in result.stderr


def test_evaluation_scores_easy_vqa(finished, tmp_path):
    evaluate("--model", finished / "stage_III", "--limit", "8", "--output_dir", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_questions"] == 8
    assert 0 <= scores["vqa_accuracy"] <= 1
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 8


@pytest.mark.exhaustive
def test_evaluation_takes_another_data_set_with_several_answers(finished, tmp_path):
    rows = {
        "picture": [{"bytes": picture_bytes(), "path": None}] * 3,
        "asked": ["what color is the shape?"] * 3,
        "answers": [["red"] * 10] * 3,
    }
    columns = {"picture": Image(), "asked": Value("string"), "answers": List(Value("string"))}
    Dataset.from_dict(rows, features=Features(columns)).to_parquet(tmp_path / "rows.parquet")
    names = ["--image_column", "picture", "--question_column", "asked", "--answer_column", "answers"]
    files = ["--dataset", tmp_path / "rows.parquet", "--output_dir", tmp_path]
    evaluate("--model", finished / "stage_III", *files, *names)
    assert json.loads((tmp_path / "scores.json").read_text())["num_questions"] == 3


@pytest.mark.exhaustive
def test_a_missing_column_is_named(finished, tmp_path):
    arguments = ["--model", finished / "stage_III", "--answer_column", "answers", "--output_dir", tmp_path]
    result = evaluate(*arguments, check=False)
    assert "no columns ['answers'], but ['image', 'question', 'answer', 'image_id']" in result.stderr


def picture_bytes() -> bytes:
    import io

    from PIL import Image as Pictures

    buffer = io.BytesIO()
    Pictures.new("RGB", (64, 64), (200, 30, 60)).save(buffer, format="PNG")
    return buffer.getvalue()
