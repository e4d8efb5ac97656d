# /// script
# dependencies = ["peft-moe"]
# ///
"""The three stages of MoE-LLaVA on real pictures and questions (easy-VQA), under the plain Trainer.

    python examples/moe_llava/train.py --small                    # a tiny text model, minutes on two cores
    python examples/moe_llava/train.py                            # SmolLM2-135M, for a GPU

A vision tower learns to name shapes and colours; it becomes the eye of a dense LLaVA, which goes through stages I and
II; the dense model becomes sparse by `from_dense`, and stage III trains its experts. After each stage the answers to
held-back questions are scored; `--dense_control` tells what the dense model would have learned in the steps of stage
III. An interrupted run goes on after the last stage it has finished.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_moe import MoeTuningStage
from peft_moe.models import MoeLlavaForConditionalGeneration


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from evaluate_vqa import answer_questions, score  # noqa: E402

from data import COLORS, SHAPES, VqaCollator, load_easy_vqa, picture_labels  # noqa: E402
from pretrained import smollm2_path  # noqa: E402


IMAGE_SIZE, PATCH_SIZE = 64, 16
SPECIAL_TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# steps and learning rates; the rates of the paper are for models a hundred times as large
DEFAULT = {
    "vision": {"max_steps": 1500, "learning_rate": 1e-3},
    "I": {"max_steps": 200, "learning_rate": 1e-3},
    "II": {"max_steps": 600, "learning_rate": 1e-4},
    "III": {"max_steps": 600, "learning_rate": 1e-4},
}
SMALL = {
    "vision": {"max_steps": 500, "learning_rate": 1e-3},
    "I": {"max_steps": 20, "learning_rate": 1e-3},
    "II": {"max_steps": 200, "learning_rate": 2e-3},
    "III": {"max_steps": 100, "learning_rate": 1e-3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/moe_llava")
    parser.add_argument("--text_model", default=None, help="folder or Hub name of a causal LM; default: SmolLM2-135M")
    parser.add_argument("--small", action="store_true", help="a tiny untrained text model instead, and fewer steps")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--moe_layers", default="interval", help="interval (paper), all, first_half or second_half")
    parser.add_argument("--freeze_projector", action="store_true", help="in stage III (figure 3 of the paper)")
    parser.add_argument("--freeze_dense_mlps", action="store_true", help="in stage III, layers that are no mixtures")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--eval_questions", type=int, default=256)
    parser.add_argument("--dense_control", action="store_true", help="also train the dense model for as long again")
    parser.add_argument("--share_of_steps", type=float, default=1.0, help="shorten every stage by this factor")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has left")
    options = parser.parse_args()
    output = Path(options.output_dir)
    if options.restart:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    run = Run(options, output, load_easy_vqa("train"), load_easy_vqa("test", num_questions=options.eval_questions))
    dense = run.stage("I", lambda: build_llava(run), MoeTuningStage("I"))
    dense = run.stage("II", lambda: dense, MoeTuningStage("II"))
    stage_three = MoeTuningStage(
        "III", dense_mlps=not options.freeze_dense_mlps, projector=not options.freeze_projector
    )
    run.stage("III", lambda: make_sparse(dense, options), stage_three)
    if options.dense_control:
        run.stage("II_again", lambda: dense, MoeTuningStage("II"))
    run.print_report()


class Run:
    """Trains stage after stage, scores each, and remembers what is done."""

    def __init__(self, options: argparse.Namespace, output: Path, train_set: Dataset, test_set: Dataset) -> None:
        self.options, self.output = options, output
        self.train_set, self.test_set = train_set, test_set
        self.schedule = SMALL if options.small else DEFAULT
        self.report_file = output / "report.json"
        settings = {name: value for name, value in vars(options).items() if name != "restart"}
        found = json.loads(self.report_file.read_text()) if self.report_file.exists() else None
        if found is not None and found["settings"] != settings:
            raise SystemExit(f"{output} holds a run with other settings: use --restart, or another --output_dir.")
        self.report: dict[str, Any] = found or {"settings": settings, "most_common_answer": majority(test_set)}

    def stage(self, name: str, make_model: Any, stage: MoeTuningStage) -> PreTrainedModel:
        """Train one stage, or load it if an earlier run has finished it."""
        folder = self.output / f"stage_{name}"
        if name in self.report:
            print(f"Stage {name} is finished, going on with {folder}")
            return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model = make_model()
        processor = self.processor()
        audit = stage.apply(model)
        print(f"\n{audit}")
        trainer = Trainer(
            model,
            self.arguments(name, remove_unused_columns=False),
            train_dataset=self.train_set,
            data_collator=VqaCollator(processor),
        )
        trainer.train()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        answers = list(answer_questions(model, processor, self.test_set, batch_size=64))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        accuracy = score(answers, self.test_set["answer"][:])["vqa_accuracy"]
        self.remember(name, {"vqa_accuracy": accuracy, "losses": losses, "trainable": audit.trainable})
        print(f"Stage {name}: VQA accuracy {accuracy:.1%} on {len(answers)} held-back questions")
        return model

    def arguments(self, name: str, **settings: Any) -> TrainingArguments:
        schedule = self.schedule["III" if name == "II_again" else name]
        steps = max(1, round(schedule["max_steps"] * self.options.share_of_steps))
        return TrainingArguments(
            str(self.output / f"checkpoints_{name}"),
            max_steps=steps,
            learning_rate=schedule["learning_rate"],
            per_device_train_batch_size=self.options.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 30),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            **settings,
        )

    def processor(self) -> LlavaProcessor:
        """64 x 64 pictures as 16 tokens, and one chat template for every text model."""
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE),
            tokenizer=self.tokenizer(),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.options.small:
            return word_tokenizer(self.train_set)
        tokenizer = AutoTokenizer.from_pretrained(self.text_model_path())
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return tokenizer

    def text_model_path(self) -> str:
        return self.options.text_model or str(smollm2_path())

    def text_model(self) -> PreTrainedModel:
        if not self.options.small:
            return AutoModelForCausalLM.from_pretrained(self.text_model_path(), dtype=torch.float32)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer()),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=128,
                tie_word_embeddings=True,
            )
        )

    def remember(self, name: str, value: Any) -> None:
        self.report[name] = value
        self.report_file.write_text(json.dumps(self.report, indent=1))

    def print_report(self) -> None:
        print(f"\n{'VQA accuracy':<28}{'held-back questions':>20}")
        print(f"{'always ' + self.report['most_common_answer'][0]:<28}{self.report['most_common_answer'][1]:>20.1%}")
        for name in [stage for stage in ("I", "II", "III", "II_again") if stage in self.report]:
            print(f"{'after stage ' + name:<28}{self.report[name]['vqa_accuracy']:>20.1%}")
        print(f"\nThe sparse model is in {self.output / 'stage_III'}, all figures in {self.report_file}.")


def majority(rows: Dataset) -> tuple[str, float]:
    """The most common answer, and the accuracy of always giving it."""
    answers = list(rows["answer"])
    best = max(sorted(set(answers)), key=answers.count)
    return best, answers.count(best) / len(answers)


def word_tokenizer(rows: Dataset) -> PreTrainedTokenizerFast:
    """One token per word of the questions and answers."""
    text = " ".join(sorted({*rows["question"], *rows["answer"]}))
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for word, _ in splitter.pre_tokenize_str(text)} | {"user", "assistant"})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def train_vision_tower(run: Run) -> CLIPForImageClassification:
    """A small CLIP vision tower that tells shape and colour of a picture apart, learned from the training pictures."""
    vision_config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = CLIPConfig(vision_config=vision_config.to_dict(), num_labels=len(COLORS) * len(SHAPES))
    classifier = CLIPForImageClassification(config)
    image_processor = run.processor().image_processor

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = image_processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")
        return {"pixel_values": pictures["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}

    trainer = Trainer(
        classifier,
        run.arguments("vision", remove_unused_columns=False),
        train_dataset=picture_labels(run.train_set),
        data_collator=collate,
    )
    trainer.train()
    run.remember("vision_loss", trainer.state.log_history[-2].get("loss"))
    return classifier


def build_llava(run: Run) -> LlavaForConditionalGeneration:
    """A dense LLaVA out of the trained vision tower, the text model, and a new projector."""
    print("\nTraining the vision tower")
    classifier = train_vision_tower(run)
    tokenizer, text_model = run.tokenizer(), run.text_model()
    if len(tokenizer) > text_model.config.vocab_size:
        text_model.resize_token_embeddings(len(tokenizer))
    config = LlavaConfig(
        vision_config=classifier.config.vision_config,
        text_config=text_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=text_model.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    inner(model.model.vision_tower).load_state_dict(inner(classifier.vision_model).state_dict())
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()


def inner(vision_model: Any) -> Any:
    """Versions of transformers differ in how deep the transformer of a vision tower sits."""
    return getattr(vision_model, "vision_model", vision_model)


def make_sparse(dense: LlavaForConditionalGeneration, options: argparse.Namespace) -> MoeLlavaForConditionalGeneration:
    return MoeLlavaForConditionalGeneration.from_dense(
        dense, num_experts=options.num_experts, num_experts_per_tok=2, moe_layers=options.moe_layers
    )


if __name__ == "__main__":
    main()
