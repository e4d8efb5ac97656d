"""MoCLE with and without its universal expert beside plain LoRA of as many trainable parameters, on four domains.

    python examples/mocle/compare.py

Clusters are found without the domain labels. Every arm sees the same rows in the same order and starts from the same
base model. Writes `outputs/mocle_comparison/report.json` and `report.md`: answer NLL and exact match per domain, which
clusters and experts took which domain. It shows its progress, and goes on where it was interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import mutual_info_score
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_moe import InstructionClusterer, MoCLEConfig, attach_encoder
from peft_moe.monitoring import ExpertLoad


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from domains import DOMAINS, collator, load_domains  # noqa: E402
from evaluation import evaluate_answers  # noqa: E402
from pretrained import minilm_path, smollm2_path  # noqa: E402


RANK, NUM_EXPERTS = 8, 4
TARGETS = ["up_proj", "down_proj"]


def lora(rank: int) -> Callable[[InstructionClusterer], LoraConfig]:
    return lambda _: LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"
    )


def mocle(**settings: Any) -> Callable[[InstructionClusterer], MoCLEConfig]:
    return lambda clusterer: MoCLEConfig.from_clusterer(
        clusterer, num_experts=NUM_EXPERTS, r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **settings
    )


ARMS: dict[str, Callable[[InstructionClusterer], Any]] = {
    "lora_equal_active_rank": lora(2 * RANK),
    "lora_equal_parameters": lora((NUM_EXPERTS + 1) * RANK),
    "mocle": mocle(),
    "mocle_without_universal": mocle(universal_expert=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=None, help="a local folder or a Hub id; default: SmolLM2")
    parser.add_argument("--encoder", default=None, help="sentence encoder; default: all-MiniLM-L6-v2")
    parser.add_argument("--output_dir", default="outputs/mocle_comparison")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_clusters", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=96, help="training rows per domain")
    parser.add_argument("--eval_rows", type=int, default=24, help="held-back rows per domain")
    parser.add_argument("--max_length", type=int, default=160, help="longest row, in tokens")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    options = parser.parse_args()

    model_path = options.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_set, eval_sets = load_domains(
        tokenizer, rows_per_domain=options.rows, eval_rows_per_domain=options.eval_rows, max_length=options.max_length
    )
    clusterer = InstructionClusterer.fit(
        train_set["instruction"], num_clusters=options.num_clusters, encoder=options.encoder or str(minilm_path())
    )
    clusters = clusterer.report(train_set, "instruction", domain_column="domain")
    train_set = clusterer.add_cluster_ids(train_set, "instruction")

    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.json"
    settings = {key: value for key, value in vars(options).items() if key not in ("arms", "seeds", "output_dir")}
    found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if found["settings"] != settings:
        raise SystemExit(f"{output} holds a comparison with other settings: remove it, or use another --output_dir.")
    found["clusters"] = clusters.to_dict()
    for seed in options.seeds:
        for arm in options.arms:
            name = f"{arm}/{seed}"
            if name not in found["runs"]:
                print(f"\n{name}")
                run = train_and_measure(
                    ARMS[arm](clusterer), model_path, tokenizer, train_set, eval_sets, seed, options
                )
                found["runs"][name] = run
                path.write_text(json.dumps(found, indent=1))
    report = written_report(found, str(clusters))
    (output / "report.md").write_text(report)
    print(report)


def train_and_measure(
    config: Any, model_path: str, tokenizer: Any, train_set: Any, eval_sets: Any, seed: int, options: Any
) -> dict[str, Any]:
    set_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"), config)
    started = time.perf_counter()
    arguments = TrainingArguments(
        f"{options.output_dir}/trainer",
        learning_rate=options.learning_rate,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    is_mocle = isinstance(config, MoCLEConfig)
    rows = train_set if is_mocle else train_set.remove_columns("cluster_ids")
    Trainer(model, arguments, train_dataset=rows, data_collator=collator(tokenizer)).train()
    result: dict[str, Any] = {"seconds": time.perf_counter() - started}
    result["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
    load = None
    if is_mocle:
        attach_encoder(model, options.encoder or str(minilm_path()), tokenizer=tokenizer)
        load = ExpertLoad.for_model(model)
    result |= evaluate_answers(model, tokenizer, eval_sets, num_generated_rows=options.eval_rows, expert_load=load)
    if load is not None:
        result["expert_load"] = load.to_dict()
        result["information_about_the_domain"] = information(load)
    return result


def information(load: ExpertLoad) -> float:
    """Mutual information between domain and expert, in bits, mean over layers; 2 bits tell four domains apart."""
    by_domain = load.split("domain")
    layers = next(iter(by_domain.values()))
    bits = []
    for layer in layers:
        table = torch.tensor([by_domain[domain][layer] for domain in by_domain]).numpy()
        bits.append(mutual_info_score(None, None, contingency=table) / torch.log(torch.tensor(2.0)).item())
    return sum(bits) / len(bits)


def written_report(found: dict[str, Any], clusters: str) -> str:
    arms = list(dict.fromkeys(name.partition("/")[0] for name in found["runs"]))
    lines = ["# MoCLE beside LoRA", "", "## Clusters, found without the domain labels", "", clusters, ""]
    lines += ["## Answer NLL in nats per token, held-back rows, mean over seeds", ""]
    lines += [
        "| arm | parameters | " + " | ".join(DOMAINS) + " | all | exact match |",
        "|---" * (len(DOMAINS) + 4) + "|",
    ]
    for arm in arms:
        runs = [run for name, run in found["runs"].items() if name.partition("/")[0] == arm]
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0] if isinstance(runs[0][key], float)}
        cells = [f"{mean[key]:.3f}" for key in (*(f"answer_nll_{domain}" for domain in DOMAINS), "answer_nll")]
        lines.append(
            f"| {arm} ({len(runs)}) | {runs[0]['trainable_parameters']:,} | {' | '.join(cells)} | "
            f"{mean['exact_match']:.3f} |"
        )
    for name, run in found["runs"].items():
        if "expert_load" in run:
            lines += ["", *expert_table(name, run)]
    return "\n".join(lines) + "\n"


def expert_table(name: str, run: dict[str, Any]) -> list[str]:
    """Which experts took which domain in the first, the middle and the last layer."""
    by_domain = ExpertLoad.from_dict(run["expert_load"]).split("domain")
    layers = list(next(iter(by_domain.values())))
    lines = [f"## Experts of {name}: {run['information_about_the_domain']:.2f} of 2 bits about the domain", ""]
    lines += ["| layer | domain | " + " | ".join(f"expert {e}" for e in range(NUM_EXPERTS)) + " |"]
    lines += ["|---" * (NUM_EXPERTS + 2) + "|"]
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for domain, counts in by_domain.items():
            shares = [count / max(sum(counts[layer]), 1) for count in counts[layer]]
            lines.append(f"| {layer} | {domain} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return lines


if __name__ == "__main__":
    main()
