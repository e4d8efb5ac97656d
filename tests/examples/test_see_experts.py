"""`see_experts.py` draws and writes what a saved MoeLlava does, on easy-VQA or another data set."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from running import run

from models.tiny_llava import tiny_llava, tiny_processor
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.monitoring import ExpertLoad, ExpertPathways


pytestmark = pytest.mark.slow
see_experts = partial(run, "moe_llava/see_experts.py")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} w0 {% endif %}"
)
NUM_ROWS = 5


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), expert_noise=1.0, moe_layers="all")
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """Questions of 1 to 5 words, so that batches have padding; several answers, of which the first is read."""
    from PIL import Image as Pictures

    buffer = io.BytesIO()
    Pictures.new("RGB", (16, 16), (200, 30, 60)).save(buffer, format="PNG")
    rows = {
        "picture": [{"bytes": buffer.getvalue(), "path": None}] * NUM_ROWS,
        "asked": [" ".join("abcde"[: length + 1]) for length in range(NUM_ROWS)],
        "answers": [["w1", "w2"]] * NUM_ROWS,
    }
    columns = {"picture": Image(), "asked": Value("string"), "answers": List(Value("string"))}
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    Dataset.from_dict(rows, features=Features(columns)).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def columns(data_file) -> list[object]:
    names = ["--image_column", "picture", "--question_column", "asked", "--answer_column", "answers"]
    return ["--dataset", data_file, "--batch_size", 2, *names]


def test_every_picture_table_and_count_is_written(model_folder, columns, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    printed = see_experts(model_folder, *columns, "--output_dir", tmp_path, "--num_pathways", 3)
    for name in ("expert_load.png", "modality.png", "pathways.png"):
        pixels = image.imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05
    table = json.loads((tmp_path / "experts.json").read_text())
    load, pathways = ExpertLoad.from_dict(table["expert_load"]), ExpertPathways.from_dict(table["pathways"])
    # questions, `w0`, the first answer and the end; four image tokens each
    num_text = sum(range(1, NUM_ROWS + 1)) + 3 * NUM_ROWS
    assert pathways.summary(token_group="text")["num_tokens"] == num_text
    assert pathways.summary(token_group="image")["num_tokens"] == 4 * NUM_ROWS
    assert {sum(counts) for counts in load.by_router(token_group="text").values()} == {2 * num_text}
    report = (tmp_path / "experts.md").read_text()
    best = pathways.top(1, token_group="text")[0]
    assert best.label in report
    assert best.label in printed.stdout
    titles = [line for line in report.splitlines() if line.startswith("## ")]
    assert [title.split(" (")[0] for title in titles] == ["## Expert load", "## Modalities", "## Pathways"]


@pytest.mark.exhaustive
def test_sets_of_experts_can_be_followed(model_folder, columns, tmp_path):
    see_experts(model_folder, *columns, "--output_dir", tmp_path, "--choice", "top_k", "--limit", 2)
    pathways = ExpertPathways.from_dict(json.loads((tmp_path / "experts.json").read_text())["pathways"])
    assert {len(chosen) for entry in pathways.top() for chosen in entry.experts} == {2}
    assert pathways.summary(token_group="image")["num_tokens"] == 2 * 4


def test_a_missing_column_is_named(model_folder, data_file, tmp_path):
    result = see_experts(model_folder, "--dataset", data_file, "--output_dir", tmp_path, check=False)
    assert "no columns ['answer', 'image', 'question'], but ['picture', 'asked', 'answers']" in result.stderr


def test_a_dense_model_is_told_that_it_has_no_experts(columns, tmp_path):
    folder = save(tiny_llava(), tmp_path / "dense")
    result = see_experts(folder, *columns, "--output_dir", tmp_path / "out", check=False)
    assert result.returncode != 0
    assert "LlavaForConditionalGeneration has no router that peft_moe knows" in result.stderr
    assert not (tmp_path / "out").exists()
