"""How much the auxiliary loss weighs under each training loop: its gradient over the one computed by hand, as a table.

    PYTHONPATH=tests python tests/distributed/aux_ratios.py

writes `aux_ratios.json` beside this file and prints the table of `docs/howto/scale.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import parallel_cases
import test_trainer
import test_wrapped
import torch
import transformers
import trl
from launching import launch
from transformers import TrainingArguments

import test_trl
from aux_by_hand import (
    COEF,
    GradientTrap,
    aux_by_hand,
    build,
    expected_gradient,
    label_share,
    outside_loss,
    rows_of,
    trainable,
)
from test_trl import preference_rows, trapping
from tiny_models import tiny_tokenizer, token_batch


FOLDER = Path(__file__).parent
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "max_grad_norm": 0,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def effect(train: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
    """What the auxiliary loss adds to the gradient that `train(model)` returns."""
    with_aux, without = (train(build(coef=coef)) for coef in (COEF, 0.0))
    return with_aux - without


def of_trainer(folder: str, steps: int = 1, loss: Any = None, **arguments: Any) -> float:
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(steps)]
    arguments = {**COMMON, "gradient_accumulation_steps": steps, "train_sampling_strategy": "sequential", **arguments}

    def train(model):
        args = TrainingArguments(folder, **arguments)
        trainer = GradientTrap(model, args, train_dataset=rows_of(batches), compute_loss_func=loss)
        trainer.train()
        return trainer.trapped

    return norm_ratio(effect(train), expected_gradient(batches, label_share(batches)))


def of_sft(folder: str, steps: int = 3) -> float:
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(steps)]
    data = datasets.Dataset.from_list(test_trl.rows_of(batches))

    def train(model):
        args = trl.SFTConfig(
            folder,
            bf16=False,
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            **COMMON,
        )
        trainer = trapping(trl.SFTTrainer)(model, args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        return trainer.trapped

    return norm_ratio(effect(train), expected_gradient(batches, label_share(batches)))


def outside(make: Callable[[torch.nn.Module], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Measured and by hand, for a trainer that builds its loss outside the model: each pass that trains weighs 1."""
    passes: list[dict[str, torch.Tensor]] = []

    def train(model):
        passes.clear()

        def note(module, args, kwargs):
            if module.training and torch.is_grad_enabled():
                passes.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask")})

        hook = model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
        trainer = make(model)
        trainer.train()
        hook.remove()
        return trainer.trapped

    found = effect(train)
    model = build(coef=0.0)
    total = sum(aux_by_hand(model, batch) for batch in passes)
    gradients = torch.autograd.grad(total, trainable(model), allow_unused=True, materialize_grads=True)
    return found[: sum(g.numel() for g in gradients)], torch.cat([g.flatten() for g in gradients]).double()


def dpo(folder: str, **arguments: Any) -> Callable[[torch.nn.Module], Any]:
    args = trl.DPOConfig(folder, bf16=False, **COMMON, **arguments)
    return lambda model: trapping(trl.DPOTrainer)(
        model, args=args, train_dataset=preference_rows(), processing_class=tiny_tokenizer()
    )


def grpo(folder: str, **arguments: Any) -> Callable[[torch.nn.Module], Any]:
    args = trl.GRPOConfig(folder, bf16=False, num_generations=2, max_completion_length=4, **COMMON, **arguments)
    return lambda model: trapping(trl.GRPOTrainer)(
        model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e"}] * 2),
        processing_class=tiny_tokenizer(),
    )


def norm_ratio(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.norm() / expected.norm()).item()


def across_processes(folder: Path) -> Iterator[tuple[str, str, float]]:
    settings = ["ddp/mole/none", "ddp/mole-task-only/none", "fsdp/mole/none", "fsdp/mole-task-only/none"]
    settings += ["ddp/mole-global/none"]
    found, _ = launch(FOLDER / "train_wrapped.py", folder / "wrapped", 2, *settings)
    yield "your own loop", "DDP, 2 processes", test_wrapped.ratio_of_aux_loss(found, "ddp/mole", is_global=False)
    scope = 'DDP, 2 processes, `router_aux_loss_scope="global"`'
    yield "your own loop", scope, test_wrapped.ratio_of_aux_loss(found, "ddp/mole-global", is_global=True)
    yield "your own loop", "FSDP2, 2 processes", test_wrapped.ratio_of_aux_loss(found, "fsdp/mole", is_global=False)
    names = ("mole", "mole-task-only")
    options = json.dumps({"accumulation": 2})
    script, config = FOLDER / "train_trainer.py", test_trainer.CONFIGS / "ddp.yaml"
    found, _ = launch(script, folder / "ddp", 2, options, *names, accelerate=config)
    yield "`Trainer`", "DDP, 2 processes", test_trainer.ratio_of_aux_loss(*(found[name] for name in names), "mole")
    for stage in (2, 3):
        found, _ = test_trainer.launch_zero(folder / f"zero{stage}", f"zero{stage}", *names)
        ratio = test_trainer.ratio_of_aux_loss(*(found[name] for name in names), "mole")
        yield "`Trainer`", f"DeepSpeed ZeRO-{stage}, 2 processes", ratio


def in_one_process(folder: str) -> Iterator[tuple[str, str, float]]:
    yield "`Trainer`", "–", of_trainer(folder)
    yield "`Trainer`", "4 micro-batches", of_trainer(folder, 4)
    for kind in ("non-reentrant", "reentrant"):
        kwargs = {"use_reentrant": kind == "reentrant"}
        ratio = of_trainer(folder, 4, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        yield "`Trainer`", f"4 micro-batches, {kind} checkpointing", ratio
    yield "`Trainer`", "bf16 autocast", of_trainer(folder, 2, bf16=True)
    yield "`Trainer`", "`label_smoothing_factor`, 4 micro-batches", of_trainer(folder, 4, label_smoothing_factor=0.1)
    yield "`Trainer`", "`compute_loss_func`, 4 micro-batches", of_trainer(folder, 4, loss=outside_loss)
    yield "trl `SFTTrainer`", "3 micro-batches", of_sft(folder)
    yield "trl `DPOTrainer`", "against a weight of 1", norm_ratio(*outside(dpo(folder)))
    yield "trl `GRPOTrainer`", "against a weight of 1", norm_ratio(*outside(grpo(folder)))


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (in_one_process(folder), across_processes(Path(folder))):
            for loop, setting, ratio in part:
                print(f"{loop}, {setting}: {ratio:.4f}", file=sys.stderr, flush=True)
                rows.append({"loop": loop, "setting": setting, "ratio": round(ratio, 6)})
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    (FOLDER / "aux_ratios.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    print("| loop | setting | measured / computed by hand |\n|---|---|---|")
    for row in rows:
        print(f"| {row['loop']} | {row['setting']} | {row['ratio']:.3f} |")


if __name__ == "__main__":
    assert parallel_cases.COEF == COEF
    main()
