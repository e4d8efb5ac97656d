"""easy-VQA: 5,000 pictures of one shape each and 48,248 questions about them, as `datasets`; and what batches them.

Published by Victor Zhou under the MIT licence (https://github.com/vzhou842/easy-VQA). The pictures are drawn by a
program: 64 x 64 pixels, one of 3 shapes in one of 8 colours. The wheel (3.2 MB) comes from PyPI and is kept in a cache
outside the checkout.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from transformers import LlavaProcessor


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretrained import PackagedModel, cached_package  # noqa: E402


EASY_VQA = PackagedModel(
    folder="easy-vqa-1.0",
    package="easy-vqa",
    version="1.0",
    wheel_sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    size_mb=3,
    prefix="easy_vqa/data/",
)
SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
FEATURES = Features(
    {"image": Image(), "question": Value("string"), "answer": Value("string"), "image_id": Value("int64")}
)


def easy_vqa_path(cache_dir: str | Path | None = None) -> Path:
    """Folder with `train.parquet` and `test.parquet`; the first call downloads 3 MB.

    Args:
        cache_dir: Where to keep it. Defaults to `$PEFT_MOE_CACHE`, else `~/.cache/peft_moe`.

    Raises:
        RuntimeError: If the package cannot be downloaded or is not the expected file.
    """
    return cached_package(EASY_VQA, _write_parquet, cache_dir)


def load_easy_vqa(split: str, *, num_questions: int | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """Questions in a fixed random order, with the columns `image`, `question`, `answer` and `image_id`.

    Raises:
        ValueError: If there is no such split, or it has fewer questions.
    """
    if split not in SPLITS:
        raise ValueError(f"easy-VQA has the splits {SPLITS}, but found {split!r}.")
    rows = load_dataset("parquet", data_files=str(easy_vqa_path(cache_dir) / f"{split}.parquet"), split="train")
    rows = rows.shuffle(seed=0)
    if num_questions is not None and num_questions > len(rows):
        raise ValueError(f"The split {split!r} of easy-VQA has {len(rows)} questions, not {num_questions}.")
    return rows if num_questions is None else rows.select(range(num_questions))


def picture_labels(rows: Dataset) -> Dataset:
    """One row per picture whose shape and colour some question tells, with `label` in 0 to 23 for the pair."""
    known: dict[int, dict[str, Any]] = {}
    answers = zip(rows["image_id"], rows["answer"], strict=True)
    for index, (image_id, answer) in enumerate(answers):
        entry = known.setdefault(image_id, {"index": index})
        for name, values in (("shape", SHAPES), ("color", COLORS)):
            if answer in values:
                entry[name] = values.index(answer)
    complete = [entry for entry in known.values() if len(entry) == 3]
    labels = [entry["color"] * len(SHAPES) + entry["shape"] for entry in complete]
    return rows.select([entry["index"] for entry in complete]).select_columns("image").add_column("label", labels)


class VqaCollator:
    """Rows with `image`, `question` and `answer` → a padded batch whose loss falls on the answer and its end."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        prompts = self.processor(
            images=[row["image"].convert("RGB") for row in rows],
            text=[format_prompt(self.processor, row["question"]) for row in rows],
        )
        answers = tokenizer([row["answer"] + tokenizer.eos_token for row in rows], add_special_tokens=False)
        input_ids = [list(p) + a for p, a in zip(prompts["input_ids"], answers["input_ids"], strict=True)]
        labels = [[-100] * len(p) + a for p, a in zip(prompts["input_ids"], answers["input_ids"], strict=True)]
        longest = max(map(len, input_ids))
        return {
            "input_ids": _pad(input_ids, longest, tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(ids) for ids in input_ids], longest, 0),
            "labels": _pad(labels, longest, -100),
            "pixel_values": torch.stack([torch.as_tensor(picture) for picture in prompts["pixel_values"]]),
        }


def format_prompt(processor: LlavaProcessor, question: str) -> str:
    """The picture and the question in the chat template of the processor, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _write_parquet(archive: zipfile.ZipFile, folder: Path) -> None:
    for split in SPLITS:
        place = f"{EASY_VQA.prefix}{split}"
        questions = json.loads(archive.read(f"{place}/questions.json"))
        columns = {
            "image": [
                {"bytes": archive.read(f"{place}/images/{image_id}.png"), "path": None} for _, _, image_id in questions
            ],
            "question": [question for question, _, _ in questions],
            "answer": [answer for _, answer, _ in questions],
            "image_id": [image_id for _, _, image_id in questions],
        }
        Dataset.from_dict(columns, features=FEATURES).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    print(easy_vqa_path())
