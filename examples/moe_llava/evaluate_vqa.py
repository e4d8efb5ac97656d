"""Answer the questions of any `datasets` VQA set with a LLaVA or a MoeLlava, and score the answers.

    python examples/moe_llava/evaluate_vqa.py --model outputs/moe_llava/stage_III                    # easy-VQA, test
    python examples/moe_llava/evaluate_vqa.py --model my-model --dataset lmms-lab/POPE --split test --metric pope

Writes `predictions.jsonl` and `scores.json` beside the model, or into `--output_dir`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, PreTrainedModel

from peft_moe import metrics


sys.path.insert(0, str(Path(__file__).resolve().parent))
from data import easy_vqa_path, format_prompt  # noqa: E402


METRICS = ("vqa_accuracy", "pope")


def answer_questions(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    rows: Dataset,
    *,
    image_column: str = "image",
    question_column: str = "question",
    batch_size: int = 16,
    max_new_tokens: int = 8,
    instruction: str = "",
) -> Iterator[str]:
    """Greedy answers, in the order of the rows, with a progress bar."""
    model.eval()
    with tqdm(total=len(rows), desc="answers", unit="question") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(range(start, min(start + batch_size, len(rows))))
            inputs = processor(
                images=[image.convert("RGB") for image in batch[image_column]],
                text=[format_prompt(processor, question + instruction) for question in batch[question_column]],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device, model.dtype)
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            yield from processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            bar.update(len(batch))


def references_of(values: list[Any]) -> list[str] | list[list[str]]:
    """Answers as the metric wants them: VQAv2 keeps each human's answer in a dict.

    >>> references_of([[{"answer": "red", "answer_id": 1}]])
    [['red']]
    """
    if isinstance(values[0], str):
        return list(values)
    return [[answer["answer"] if isinstance(answer, dict) else answer for answer in answers] for answers in values]


def score(predictions: list[str], references: list[Any], metric: str = "vqa_accuracy") -> dict[str, float]:
    """What the metric of this package says."""
    loaded = evaluate.load(metrics.path(metric))
    return loaded.compute(predictions=predictions, references=references_of(references))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name, with its processor")
    parser.add_argument("--dataset", default=None, help="folder, file or Hub name; default: easy-VQA")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--question_column", default="question")
    parser.add_argument("--answer_column", default="answer", help="one answer (str) or several; VQAv2: answers")
    parser.add_argument("--metric", default="vqa_accuracy", choices=METRICS)
    parser.add_argument("--instruction", default="", help="what to add to each question")
    parser.add_argument("--limit", type=int, default=None, help="only the first rows")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output_dir", default=None)
    options = parser.parse_args()

    rows = load_rows(options.dataset, options.split)
    if missing := {options.image_column, options.question_column, options.answer_column} - set(rows.column_names):
        parser.error(f"the data set has no columns {sorted(missing)}, but {rows.column_names}")
    rows = rows if options.limit is None else rows.select(range(min(options.limit, len(rows))))
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype, device_map="auto")
    answers = list(
        answer_questions(
            model,
            processor,
            rows,
            image_column=options.image_column,
            question_column=options.question_column,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            instruction=options.instruction,
        )
    )
    references = rows[options.answer_column][:]
    scores = {**score(answers, references, options.metric), "num_questions": len(rows)}
    output = Path(options.output_dir or options.model)
    output.mkdir(parents=True, exist_ok=True)
    questions = rows[options.question_column][:]
    with (output / "predictions.jsonl").open("w") as file:
        for question, answer, reference in zip(questions, answers, references, strict=True):
            file.write(json.dumps({"question": question, "prediction": answer, "reference": reference}) + "\n")
    (output / "scores.json").write_text(json.dumps(scores, indent=1))
    print("\n".join(f"{name:<16}{value:.4g}" for name, value in scores.items()))


def load_rows(dataset: str | None, split: str) -> Dataset:
    """A data set from the Hub, a folder, or a file; easy-VQA where none is named."""
    if dataset is None:
        dataset = str(easy_vqa_path() / f"{split}.parquet")
    file = Path(dataset)
    if file.is_file():
        kind = {".jsonl": "json", ".json": "json", ".csv": "csv"}.get(file.suffix, file.suffix.lstrip("."))
        return load_dataset(kind, data_files=dataset, split="train")
    return load_dataset(dataset, split=split)


if __name__ == "__main__":
    main()
