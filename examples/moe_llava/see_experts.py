"""See which experts of a saved MoeLlava work, on what, and by which pathways: figures 4 to 6 of MoE-LLaVA.

    python examples/moe_llava/see_experts.py outputs/moe_llava/stage_III                     # on easy-VQA, test
    python examples/moe_llava/see_experts.py my-model --dataset my-rows.parquet --output_dir experts

Writes, beside the model or into `--output_dir`: `expert_load.png`, every choice of every token; `modality.png`, text
against image tokens (figures 4 and 5); `pathways.png`, the most common sequences of experts (figure 6); `experts.md`,
the same as tables; `experts.json`, all counts. Questions are read with their answers, and nothing is generated.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, PreTrainedModel

import peft_moe  # noqa: F401
from peft_moe.monitoring import (
    ExpertLoad,
    ExpertPathways,
    expert_load_report,
    modality_report,
    pathways_report,
    plot_expert_load,
    plot_modality,
    plot_pathways,
    record_expert_load,
    record_pathways,
)


sys.path.insert(0, str(Path(__file__).resolve().parent))
from evaluate_vqa import load_rows, references_of  # noqa: E402

from data import VqaCollator  # noqa: E402


def see_experts(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    rows: Dataset,
    *,
    choice: str = "top_1",
    batch_size: int = 16,
) -> tuple[ExpertLoad, ExpertPathways]:
    """Expert load (every choice) and pathways of all tokens of rows with `image`, `question` and `answer`."""
    collate = VqaCollator(processor)
    model.eval()
    with record_expert_load(model) as load, record_pathways(model, choice=choice) as pathways:
        with tqdm(total=len(rows), desc="reading", unit="question") as bar:
            for start in range(0, len(rows), batch_size):
                batch = list(rows.select(range(start, min(start + batch_size, len(rows)))))
                inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                del inputs["labels"]
                with torch.no_grad():
                    model(**inputs)
                bar.update(len(batch))
    return load, pathways


def write(load: ExpertLoad, pathways: ExpertPathways, output: Path, *, num_pathways: int = 10) -> None:
    """The three pictures, the report and the counts."""
    output.mkdir(parents=True, exist_ok=True)
    followed = pathways.expert_load()
    plot_expert_load(load, output / "expert_load.png", by="token_group")
    plot_modality(followed, output / "modality.png")
    plot_pathways(pathways, output / "pathways.png", n=num_pathways)
    what = "best expert of each token" if pathways.choice == "top_1" else "every chosen expert"
    parts = {
        "Expert load (every chosen expert)": expert_load_report(load, by="token_group"),
        f"Modalities ({what})": modality_report(followed),
        f"Pathways ({what})": pathways_report(pathways, n=num_pathways),
    }
    (output / "experts.md").write_text("\n".join(f"## {title}\n\n{text}" for title, text in parts.items()))
    counts = {"expert_load": load.to_dict(), "pathways": pathways.to_dict()}
    (output / "experts.json").write_text(json.dumps(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a MoeLlava, with its processor")
    parser.add_argument("--dataset", default=None, help="folder, file or Hub name; default: easy-VQA")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--question_column", default="question")
    parser.add_argument(
        "--answer_column", default="answer", help="one answer (str) or several, of which the first is read"
    )
    parser.add_argument("--limit", type=int, default=512, help="only the first rows; 0 takes all")
    parser.add_argument("--choice", default="top_1", choices=["top_1", "top_k"], help="what a pathway is made of")
    parser.add_argument("--num_pathways", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output_dir", default=None)
    options = parser.parse_args()

    rows = load_rows(options.dataset, options.split)
    columns = {
        "image": options.image_column,
        "question": options.question_column,
        "answer": options.answer_column,
    }
    if missing := set(columns.values()) - set(rows.column_names):
        parser.error(f"the data set has no columns {sorted(missing)}, but {rows.column_names}")
    rows = rows.select(range(min(options.limit, len(rows)))) if options.limit else rows
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype, device_map="auto")
    rows = standard(rows, columns)
    load, pathways = see_experts(model, processor, rows, choice=options.choice, batch_size=options.batch_size)
    output = Path(options.output_dir or options.model)
    write(load, pathways, output, num_pathways=options.num_pathways)
    print(pathways_report(pathways, n=options.num_pathways))
    print(f"Pictures, tables and counts are in {output}.")


def standard(rows: Dataset, columns: dict[str, str]) -> Dataset:
    """Only the columns that are read, under the names of easy-VQA, with one answer for each question."""
    rows = rows.select_columns(list(columns.values())).rename_columns(
        {old: new for new, old in columns.items() if new != old}
    )
    answers = [answer if isinstance(answer, str) else answer[0] for answer in references_of(rows["answer"][:])]
    return rows.remove_columns("answer").add_column("answer", answers)


if __name__ == "__main__":
    main()
