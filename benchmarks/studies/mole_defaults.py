"""Measures what `MoLEConfig` should default to: gates, top-k, balance, router initialisation and learning rate.

    OMP_NUM_THREADS=1 python benchmarks/studies/mole_defaults.py --minutes 75

A small Llama is pretrained in the run on the bare texts of four real instruction domains, frozen, and fine-tuned on
their mix with every arm: plain LoRA at the same active rank and with the same parameters, one LoRA per domain, and
variants of MoLE. Each arm chooses its learning rate on validation rows with seed 0, then all seeds are scored on test
rows. Results go to `benchmarks/results/mole_defaults.json` after every run, so an interrupted or shortened measurement
is still readable; `--report` prints the tables of a finished file. What the numbers mean is in `log.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from mole_defaults_arms import ARMS, QUICK, RANK, Arm, Sizes
from mole_defaults_data import (
    DOMAINS,
    END,
    Batches,
    Row,
    Texts,
    collate,
    encode,
    pretraining_documents,
    read_domains,
    train_tokenizer,
)
from mole_defaults_report import print_report
from mole_defaults_scores import score
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_moe


DATA = Path(__file__).parents[2] / "examples" / "data" / "domains"
RESULTS = Path(__file__).parents[1] / "results"


# ------------------------------------------------------------------------------------------------------------ training


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then linear to zero."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def pretrain(texts: Texts, tokenizer: tokenizers.Tokenizer, sizes: Sizes) -> LlamaForCausalLM:
    """Language modelling of bare texts; half of the documents repeat one of their lines, so that copying is learnt."""
    torch.manual_seed(0)
    draw = random.Random(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    documents = pretraining_documents(texts)
    newline = tokenizer.encode("\n").ids
    encoded = [[tokenizer.encode(line).ids for line in document] for document in documents]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    stream: list[int] = []
    losses = []
    for step in range(sizes.pretrain_steps):
        while len(stream) < sizes.pretrain_batch * sizes.max_length:
            lines = draw.choice(encoded)
            lines = lines + draw.choices(lines, k=2) if draw.random() < 0.5 else lines
            stream += [token for line in lines for token in [*line, *newline]] + [tokenizer.token_to_id(END)]
        size = sizes.pretrain_batch * sizes.max_length
        batch, stream = torch.tensor(stream[:size]).view(sizes.pretrain_batch, -1), stream[size:]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * learning_rate_factor(step, sizes.pretrain_steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 199:
            say(f"pretraining step {step + 1}: loss {sum(losses[-100:]) / len(losses[-100:]):.3f}")
    return model.eval()


def build(base: LlamaForCausalLM, arm: Arm, seed: int) -> peft.PeftModel:
    """A fresh copy of the base model with the adapter of an arm."""
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), arm.config())


def fine_tune(model: peft.PeftModel, batches: Batches, *, steps: int, lr: float, router_lr_factor: float) -> float:
    """AdamW without weight decay. Returns the mean loss of the last tenth."""
    routers = [p for name, p in model.named_parameters() if p.requires_grad and "router" in name]
    experts = [p for name, p in model.named_parameters() if p.requires_grad and "router" not in name]
    groups = [{"params": experts, "factor": 1.0}, {"params": routers, "factor": router_lr_factor}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"] * learning_rate_factor(step, steps)
        loss = model(**batches.next()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(experts, 1.0)
        if routers and routers[0].grad is not None:
            nn.utils.clip_grad_norm_(routers, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Bench:
    """What all runs share, and the file that they end up in."""

    base: LlamaForCausalLM
    train: dict[str, list[Row]]
    sides: dict[str, dict[str, list[Row]]]
    sizes: Sizes
    result: dict[str, Any]
    path: Path
    deadline: float

    def run(self, arm: Arm, lr: float, seed: int) -> dict[str, Any] | None:
        """One fine-tuning, or the one that was already done; `None` when time is up."""
        for done in self.result["runs"]:
            if (done["arm"], done["lr"], done["seed"]) == (arm.name, lr, seed):
                return done
        typical = max((run["seconds"] for run in self.result["runs"][-20:]), default=0.0)
        if time.monotonic() + typical > self.deadline:
            return None
        start = time.monotonic()
        try:
            found = self._oracle(arm, lr, seed) if arm.is_oracle else self._mixed(arm, lr, seed)
        except FloatingPointError:
            found = {"diverged": True}
        run = {"arm": arm.name, "lr": lr, "seed": seed, "seconds": round(time.monotonic() - start, 1), **found}
        self.result["runs"].append(run)
        self.path.write_text(json.dumps(self.result, indent=1))
        say(
            f"{arm.name:<30} lr {lr:<6g} seed {seed} {run['seconds']:>6.1f} s  "
            f"validation {macro(run, 'validation'):.4f}"
        )
        return run

    def _mixed(self, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
        model = build(self.base, arm, seed)
        batches = Batches(self.train, self.sizes.rows_per_domain_and_step, seed)
        loss = fine_tune(model, batches, steps=self.sizes.steps, lr=lr, router_lr_factor=arm.router_lr_factor)
        is_soft = bool(arm.settings.get("soft"))
        return {"train_loss": loss, **score(model, self.sides, is_soft=is_soft)}

    def _oracle(self, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {"validation": {}, "test": {}}
        for domain in DOMAINS:
            model = build(self.base, arm, seed)
            batches = Batches({domain: self.train[domain]}, self.sizes.rows_per_domain_and_step, seed)
            fine_tune(model, batches, steps=self.sizes.steps, lr=lr, router_lr_factor=1.0)
            one = score(model, {side: {domain: rows[domain]} for side, rows in self.sides.items()})
            for side in ("validation", "test"):
                found[side] |= one[side]
        return found

    def best_lr(self, arm: Arm) -> float | None:
        """By validation NLL of seed 0; the grid of a core arm grows once if its best value is at an edge."""
        grid = list(self.sizes.learning_rates)
        runs = [self.run(arm, lr, 0) for lr in grid]
        if any(run is None for run in runs):
            return None
        scores = {lr: macro(run, "validation") for lr, run in zip(grid, runs)}
        best = min(scores, key=scores.__getitem__)
        if arm.is_core and len(grid) > 1 and best in (grid[0], grid[-1]):
            beyond = round(best * best / (grid[1] if best == grid[0] else grid[-2]), 6)
            if (run := self.run(arm, beyond, 0)) is not None:
                scores[beyond] = macro(run, "validation")
        return min(scores, key=scores.__getitem__)

    def finer_lr(self, arm: Arm) -> float | None:
        """The best of the grid or one of its neighbours at half the distance, again by validation NLL of seed 0."""
        middle = self.result["best_lr"][arm.name]
        scores = {}
        for lr in (middle, round(middle / math.sqrt(3), 5), round(middle * math.sqrt(3), 5)):
            run = self.run(arm, lr, 0)
            if run is None:
                return None
            scores[lr] = macro(run, "validation")
        return min(scores, key=scores.__getitem__)


def macro(run: dict[str, Any] | None, side: str) -> float:
    """Mean over domains; infinite where the run diverged."""
    if run is None or side not in run:
        return math.inf
    value = sum(run[side].values()) / len(run[side])
    return value if math.isfinite(value) else math.inf


def measure(bench: Bench, arms: tuple[Arm, ...]) -> None:
    """Three seeds of each arm, in their order; then core arms at finer learning rates; then more seeds of those."""
    few = range(min(3, bench.sizes.seeds))
    for arm in arms:
        lr = bench.best_lr(arm)
        if lr is None:
            return
        bench.result["best_lr"][arm.name] = lr
        if any(bench.run(arm, lr, seed) is None for seed in few):
            return
    core = [arm for arm in arms if arm.is_core]
    for arm in core:
        lr = bench.finer_lr(arm)
        if lr is None:
            return
        bench.result["finer_lr"][arm.name] = lr
        if any(bench.run(arm, lr, seed) is None for seed in few):
            return
    for seed in range(len(few), bench.sizes.seeds):
        if any(bench.run(arm, bench.result["finer_lr"][arm.name], seed) is None for arm in core):
            return


def compare_with_peft(base: LlamaForCausalLM, rows: list[Row]) -> dict[str, float]:
    """Largest differences between `MoLEConfig(num_experts=1)` and peft's `LoraConfig`, given the same weights."""
    ours = build(base, Arm("lora", {"num_experts": 1, "init_lora_weights": False}), 0)
    names = ["gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    )
    parameters = dict(theirs.named_parameters())
    pairs = []
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            twin = parameters[name.replace("mole_", "lora_")]
            is_a = ".mole_A." in name
            twin.data.copy_(parameter.data[0] if is_a else parameter.data[0].T)
            pairs.append((parameter, twin, is_a))
    batch = collate(rows)
    results = [model(**batch) for model in (ours, theirs)]
    for result in results:
        result.loss.backward()
    differences = [
        float(((a.grad[0] if is_a else a.grad[0].T) - b.grad).abs().max() / b.grad.abs().max()) for a, b, is_a in pairs
    ]
    return {
        "adapted_linears": len(pairs) // 2,
        "max_logit_difference": float((results[0].logits - results[1].logits).abs().max()),
        "max_relative_gradient_difference": max(differences),
    }


def runs_of_the_same_base(earlier: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an interrupted measurement, if they started from the very same base model and data."""
    for key in ("base", "sizes", "rows", "versions"):
        if json.loads(json.dumps(now[key])) != earlier[key]:
            raise SystemExit(f"--resume: {key!r} differs from that of the result file. Start again without --resume.")
    known = set(now["arms"])
    return [run for run in earlier["runs"] if run["arm"] in known]


def say(text: str) -> None:
    """Progress, to the terminal."""
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    """The name of the CPU, without the host's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Pretrains, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <domain>.jsonl")
    parser.add_argument("--minutes", type=float, default=75, help="stop starting runs after this long")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it works")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument(
        "--resume", action="store_true", help="keep the runs of the result file and do what is missing"
    )
    parser.add_argument("--report", action="store_true", help="only print the tables of the result file")
    arguments = parser.parse_args()
    name = "mole_defaults_quick.json" if arguments.quick else "mole_defaults.json"
    path = arguments.out or RESULTS / name
    if arguments.report:
        print_report(json.loads(path.read_text()))
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sizes = QUICK if arguments.quick else Sizes()
    texts = read_domains(arguments.data, sizes)
    tokenizer = train_tokenizer(texts, sizes.vocab)
    base = pretrain(texts, tokenizer, sizes)
    rows = {
        side: {domain: [encode(row, tokenizer, sizes.max_length) for row in found[domain]] for domain in DOMAINS}
        for side, found in (("train", texts.train), ("validation", texts.validation), ("test", texts.test))
    }
    sides = {side: rows[side] for side in ("validation", "test")}
    parameters = {
        arm.name: sum(p.numel() for p in build(base, arm, 0).parameters() if p.requires_grad) for arm in ARMS
    }
    result: dict[str, Any] = {
        "commands": [" ".join(["python benchmarks/studies/mole_defaults.py", *map(str, sys.argv[1:])])],
        "hardware": f"CPU only, 1 thread, {processor()}",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, tokenizers, peft_moe)},
        },
        "sizes": sizes.__dict__,
        "rows": {side: {domain: len(found[domain]) for domain in DOMAINS} for side, found in rows.items()},
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "pretraining_seconds": round(time.monotonic() - start),
        "same_as_peft_lora": compare_with_peft(base, rows["train"]["boolq"][:4]),
        "base": score(base, sides),
        "arms": {
            arm.name: {
                "settings": arm.settings,
                "router_lr_factor": arm.router_lr_factor,
                "is_oracle": arm.is_oracle,
                "is_core": arm.is_core,
                "active_rank": arm.active_rank,
                "trainable_parameters": parameters[arm.name] * (len(DOMAINS) if arm.is_oracle else 1),
            }
            for arm in ARMS
        },
        "best_lr": {},
        "finer_lr": {},
        "runs": [],
    }
    say(
        f"pretrained in {result['pretraining_seconds']} s; "
        f"MoLE with one expert against peft: {result['same_as_peft_lora']}"
    )
    path.parent.mkdir(exist_ok=True)
    if arguments.resume:
        earlier = json.loads(path.read_text())
        result["runs"] = runs_of_the_same_base(earlier, result)
        result["commands"] = earlier["commands"] + result["commands"]
    bench = Bench(base, rows["train"], sides, sizes, result, path, start + 60 * arguments.minutes)
    measure(bench, ARMS)
    print_report(result)


if __name__ == "__main__":
    main()
