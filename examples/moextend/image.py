"""MoExtend on pictures: a sparse LLaVA that answers about shapes gets experts for questions about colours (easy-VQA).

    python examples/moextend/image.py --small                     # a tiny untrained text model, two minutes on one
    core python examples/moextend/image.py                             # SmolLM2-135M, for a GPU

0. Base: the three stages of ../moe_llava/train.py on the questions that name no colour.
1. Alignment: the projector alone trains on the questions that do.
2. Extension: the Extender measures which layers choose other experts for them.
3. Fine-tuning on them, with equal steps: MoExtend in the layers of the Extender, in the first half and in every second
   layer; all weights but the vision tower; LoRA on the experts. The projector trains in every arm.

Reported is the VQA accuracy on held-back questions of both kinds. An interrupted run goes on.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from peft_moe import Extender, ExtenderReport, MoeTuningStage


HERE = Path(__file__).resolve().parent
# in front of this folder, whose train.py is another one
sys.path[:0] = [str(HERE.parent / "moe_llava"), str(HERE.parent)]
sys.path.append(str(HERE))
from arms import ARMS, Comparison, adapted, config_of, free_memory, num_trained, train  # noqa: E402
from evaluate_vqa import answer_questions, score  # noqa: E402
from train import Run, build_llava, make_sparse, word_tokenizer  # noqa: E402

from data import COLORS, VqaCollator, load_easy_vqa  # noqa: E402


DEFAULT = {
    "share_of_steps": 1.0,
    "align_steps": 50,
    "extender_steps": 100,
    "steps": 200,
    "probe": 512,
    "eval_questions": 256,
}
SMALL = {
    "share_of_steps": 0.3,
    "align_steps": 10,
    "extender_steps": 15,
    "steps": 40,
    "probe": 64,
    "eval_questions": 64,
}
# not tuned: what an arm gets in a comparison that means something has to be searched for each of them
LEARNING_RATES = {"align": 1e-3, "full": 1e-4, "lora_experts": 1e-3}
MOEXTEND_LEARNING_RATE = 5e-4
PROJECTOR = "multi_modal_projector"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/moextend_image")
    parser.add_argument("--small", action="store_true", help="a tiny untrained text model, and fewer steps")
    parser.add_argument("--text_model", default=None, help="folder or Hub name of a causal LM; default: SmolLM2-135M")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--moe_layers", default="all", help="all, interval, first_half or second_half")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, value in DEFAULT.items():
        parser.add_argument(
            f"--{name}", type=type(value), default=None, help=f"default: {value}; small: {SMALL[name]}"
        )
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has left")
    options = parser.parse_args()
    for name, value in (SMALL if options.small else DEFAULT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    settings = {n: v for n, v in vars(options).items() if n not in ("arms", "seeds", "restart", "output_dir")}
    comparison = Comparison(Path(options.output_dir), settings, restart=options.restart)
    questions = Questions(options, comparison.output)

    comparison.once("base", questions.make_base)
    found = ExtenderReport.from_dict(comparison.once("extender", questions.measure_shift))
    for seed in options.seeds:
        for arm in options.arms:
            comparison.once(f"{arm}/{seed}", lambda arm=arm, seed=seed: questions.fine_tune(arm, found, seed))
            free_memory()
    comparison.write(
        "MoExtend: from shapes to colours",
        "VQA accuracy on held-back questions, in percent; new: questions that name a colour, old: the others.",
        comparison.table("vqa_accuracy", digits=1, larger_is_better=True),
    )


def names_a_color(row: dict[str, Any]) -> bool:
    """Whether a question is about colours."""
    return any(word in row["question"] for word in ("color", *COLORS))


class BaseRun(Run):
    """The run of ../moe_llava/train.py on some of the questions, with the words of all of them."""

    def __init__(
        self, options: argparse.Namespace, output: Path, old: Dataset, old_test: Dataset, words: Dataset
    ) -> None:
        self.words = words
        output.mkdir(exist_ok=True)
        super().__init__(options, output, old, old_test)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(self.words) if self.options.small else super().tokenizer()


class Questions:
    """The stages, on questions of both kinds."""

    def __init__(self, options: argparse.Namespace, output: Path) -> None:
        self.options, self.output = options, output
        self.all = load_easy_vqa("train")
        self.new, self.old = self._split(self.all)
        tests = self._split(load_easy_vqa("test"))
        self.new_test, self.old_test = (rows.select(range(options.eval_questions)) for rows in tests)
        self.run = BaseRun(options, output / "stages", self.old, self.old_test, self.all)
        self.processor = self.run.processor()
        self.collate = VqaCollator(self.processor)

    @staticmethod
    def _split(rows: Dataset) -> tuple[Dataset, Dataset]:
        is_new = [names_a_color({"question": question}) for question in rows["question"]]
        return tuple(rows.select([i for i, found in enumerate(is_new) if found == side]) for side in (True, False))

    def make_base(self) -> dict[str, Any]:
        """A sparse LLaVA that has learnt the old questions, with its projector aligned to the new ones."""
        set_seed(0)
        # the vision tower learns from all pictures: it is the eye, and not what is extended
        eye = copy.copy(self.run)
        eye.train_set = self.all
        dense = self.run.stage("I", lambda: build_llava(eye), MoeTuningStage("I"))
        dense = self.run.stage("II", lambda: dense, MoeTuningStage("II"))
        model = self.run.stage("III", lambda: make_sparse(dense, self.options), MoeTuningStage("III"))
        print("\nAlignment: the projector on the new questions")
        MoeTuningStage("I").apply(model)
        losses = self._train(model, self.options.align_steps, LEARNING_RATES["align"], seed=0)
        model.save_pretrained(self.output / "aligned")
        return {**self._scores(model), "losses": losses}

    def measure_shift(self) -> dict[str, Any]:
        """The probe set is not trained on."""
        probe = self.new.select(range(self.options.probe))
        rest = self.new.select(range(self.options.probe, len(self.new)))
        arguments = TrainingArguments(
            str(self.output / "trainer"), lr_scheduler_type="cosine", report_to="none", remove_unused_columns=False
        )
        report = Extender(self._aligned()).measure(
            rest,
            probe,
            steps=self.options.extender_steps,
            batch_size=self.options.batch_size,
            data_collator=self.collate,
            args=arguments,
        )
        return report.to_dict()

    def fine_tune(self, arm: str, found: ExtenderReport, seed: int) -> dict[str, Any]:
        """Train one arm on the new questions and ask it about both kinds."""
        set_seed(seed)
        config = config_of(arm, found, rank=self.options.lora_rank, task_type="CAUSAL_LM", modules_to_save=[PROJECTOR])
        model = adapted(self._aligned(), config)
        if config is None:
            MoeTuningStage("II").apply(model)
        result = {"trained_parameters": num_trained(model), "layers": getattr(config, "layers", None)}
        learning_rate = LEARNING_RATES.get(arm, MOEXTEND_LEARNING_RATE)
        result["losses"] = self._train(model, self.options.steps, learning_rate, seed=seed)
        return {**result, **self._scores(model)}

    def _aligned(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.output / "aligned", dtype=torch.float32)

    def _train(self, model: Any, steps: int, learning_rate: float, *, seed: int) -> list[float]:
        return train(
            model,
            self.new,
            self.collate,
            self.output / "trainer",
            steps=steps,
            batch_size=self.options.batch_size,
            learning_rate=1e-3 if self.options.small else learning_rate,
            seed=seed,
        )

    def _scores(self, model: Any) -> dict[str, float]:
        scores = {}
        for side, rows in (("old", self.old_test), ("new", self.new_test)):
            answers = list(answer_questions(model, self.processor, rows, batch_size=64))
            scores[f"vqa_accuracy_{side}"] = 100 * score(answers, rows["answer"][:])["vqa_accuracy"]
        return scores


if __name__ == "__main__":
    main()
