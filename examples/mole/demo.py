"""The main job from end to end: fine-tune SmolLM2 with a mixture of LoRA experts, measure, save, reload, plot.

Run it by `make demo`. It takes a few minutes on two cores, shows its progress, and goes on where it was interrupted.
Results are written to `outputs/mole_demo/`: `adapter/`, `report.json` and `expert_load.png`.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_moe import ExpertLoadCallback, MoLEConfig, find_intact_checkpoint
from peft_moe.monitoring import ExpertLoad, plot_expert_load


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from domains import CLOSED_DOMAINS, DOMAINS, collator, load_domains  # noqa: E402
from evaluation import evaluate_answers  # noqa: E402
from pretrained import smollm2_path  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/mole_demo")
    parser.add_argument("--model_name_or_path", default=None, help="a local folder or a Hub id; default: SmolLM2")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=96, help="training rows per domain")
    parser.add_argument("--eval_rows", type=int, default=16, help="held-back rows per domain")
    parser.add_argument("--max_length", type=int, default=160, help="longest row, in tokens")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has left")
    return parser.parse_args()


def main() -> None:
    options = parse()
    started = time.perf_counter()
    output = Path(options.output_dir)
    if options.restart:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    remember = Memory(output / "report.json", vars(options))

    model_path = options.model_name_or_path or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_set, eval_sets = load_domains(
        tokenizer, rows_per_domain=options.rows, eval_rows_per_domain=options.eval_rows, max_length=options.max_length
    )
    print(f"{len(train_set)} training rows, {options.eval_rows} held-back rows in each of {len(DOMAINS)} domains")

    def measure(model: Any, expert_load: ExpertLoad | None = None) -> dict[str, float]:
        return evaluate_answers(
            model, tokenizer, eval_sets, num_generated_rows=options.eval_rows, expert_load=expert_load
        )

    def measure_with_load(model: Any) -> dict[str, Any]:
        load = ExpertLoad.for_model(model)
        return {**measure(model, load), "expert_load": load.to_dict()}

    remember("environment", describe_environment)
    before = remember("before", lambda: measure(load_base(model_path)))
    remember("seconds_per_step", lambda: compare_step_times(model_path, train_set, tokenizer, options.batch_size))

    set_seed(0)
    model = get_peft_model(load_base(model_path), mole_config())
    trainable, total = model.get_nb_trainable_parameters()
    remember("trainable_share", lambda: trainable / total)
    train(model, tokenizer, train_set, options, output)
    model.save_pretrained(output / "adapter")

    after = remember("after", lambda: measure_with_load(model))
    load = ExpertLoad.from_dict(after["expert_load"])
    plot_expert_load(load, output / "expert_load.png")
    remember("reload_is_bit_equal", lambda: reloads_bit_equal(model, tokenizer, output))
    prompt = eval_sets["boolq"][0]["prompt"]
    answer = generate(model, tokenizer, prompt)
    print_report(before, after, remember.found, load)
    print(f"\nA question it has not seen:\n{prompt.strip()}\n→ {answer}")
    print(
        f"\nAll results are in {output}/ (adapter/, report.json, expert_load.png). "
        f"{time.perf_counter() - started:.0f} s"
    )
    if not remember.found["reload_is_bit_equal"]:
        sys.exit("The reloaded adapter gives other logits than the trained one.")


class Memory:
    """Keeps results in a file, so that an interrupted run does not compute them again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = {key: value for key, value in settings.items() if key != "restart"}
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if self.found["settings"] != settings:
            raise SystemExit(f"{path.parent} holds a run with other settings: use --restart, or another --output_dir.")

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = compute()
            self.path.write_text(json.dumps(self.found, indent=1))
        return self.found[name]


def describe_environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "peft-moe")
    found = {name: version(name) for name in packages}
    return {
        "python": platform.python_version(),
        **found,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def load_base(model_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")


def mole_config() -> MoLEConfig:
    return MoLEConfig(num_experts=4, r=8, lora_alpha=16, task_type="CAUSAL_LM")


def train(model: PeftModel, tokenizer: Any, train_set: Any, options: argparse.Namespace, output: Path) -> None:
    """The plain Trainer; takes up the newest checkpoint that is whole, if there is one."""
    args = TrainingArguments(
        str(output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        warmup_steps=4,
        logging_steps=8,
        save_steps=8,
        save_total_limit=1,  # the old one goes when the new one is complete
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=train_set,
        data_collator=collator(tokenizer),
        callbacks=[ExpertLoadCallback()],
    )
    trainer.train(resume_from_checkpoint=find_intact_checkpoint(args.output_dir))


def compare_step_times(model_path: str, train_set: Any, tokenizer: Any, batch_size: int) -> dict[str, float]:
    """Median seconds of a training step with MoLE and with plain LoRA of the same rank on the same linears."""
    mole = get_peft_model(load_base(model_path), mole_config())
    config = mole.peft_config["default"]
    targets = sorted(config.target_modules | config.lora_target_modules)
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=config.lora_dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    models = {"mole": mole, "lora": get_peft_model(load_base(model_path), lora)}
    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in train_set]
    batch = collator(tokenizer)(rows[: batch_size // 2])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(4):
        for name, model in models.items():
            model.train()
            start = time.perf_counter()
            model(**batch).loss.backward()
            times[name].append(time.perf_counter() - start)
            model.zero_grad()
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def reloads_bit_equal(model: PeftModel, tokenizer: Any, output: Path) -> bool:
    """Whether a fresh process that loads the saved adapter computes the very same logits."""
    batch = dict(tokenizer(["The capital of France is", "Answer with yes or no."], return_tensors="pt", padding=True))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    save_file({**batch, "num_threads": torch.tensor(torch.get_num_threads())}, output / "batch.safetensors")
    files = [str(output / "adapter"), str(output / "batch.safetensors"), str(output / "logits.safetensors")]
    subprocess.run([sys.executable, str(HERE / "reload.py"), *files], check=True)
    return torch.equal(load_file(files[2])["logits"], expected)


def generate(model: PeftModel, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def print_report(before: dict[str, float], after: dict[str, float], found: dict[str, Any], load: ExpertLoad) -> None:
    print(f"\n{'domain':<16}{'answer NLL':>12}{'after':>9}{'exact match':>14}{'after':>9}")
    for domain in DOMAINS:
        key = f"exact_match_{domain}"
        match = f"{before[key]:>14.0%}{after[key]:>9.0%}" if domain in CLOSED_DOMAINS else f"{'–':>14}{'–':>9}"
        key = f"answer_nll_{domain}"
        print(f"{domain:<16}{before[key]:>12.3f}{after[key]:>9.3f}{match}")
    print(f"{'mean':<16}{before['answer_nll']:>12.3f}{after['answer_nll']:>9.3f}", end="")
    print(f"{before['exact_match']:>14.0%}{after['exact_match']:>9.0%}")
    seconds = found["seconds_per_step"]
    print(f"\ntrainable share    {found['trainable_share']:.2%}")
    print(f"training step      {seconds['mole']:.2f} s, plain LoRA {seconds['lora']:.2f} s", end="")
    print(f" ({seconds['mole'] / seconds['lora']:.2f}x)")
    print("expert load        entropy (1 = balanced), largest share, dead experts")
    for domain in DOMAINS:
        summary = load.summary(domain=domain)
        print(f"  {domain:<17}{summary.entropy:.3f}, {summary.max_share:.0%}, {summary.num_dead_experts}")
    print(f"reload             {'bit-equal logits in a new process' if found['reload_is_bit_equal'] else 'DIFFERS'}")


if __name__ == "__main__":
    main()
