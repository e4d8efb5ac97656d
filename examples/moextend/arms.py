"""What both comparisons of this folder share: arms, the report that an interrupted run goes on with, the table."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_moe import ExtenderReport, MoExtendConfig


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOEXTEND_ARMS = ("moextend_extender", "moextend_first_half", "moextend_interval")
ARMS = (*MOEXTEND_ARMS, "full", "lora_experts")


def config_of(arm: str, found: ExtenderReport, *, rank: int, **fields: Any) -> PeftConfig | None:
    """The configuration of an arm, `None` for full fine-tuning.

    Every MoExtend arm extends half of the layers and copies the expert that the new domain uses most.
    """
    if arm == "full":
        return None
    if arm == "lora_experts":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=EXPERTS, **fields)
    if arm == "moextend_extender":
        return found.choose_layers(p=0.5, **fields)
    layers = list(found.before)
    half = len(layers) // 2
    layers = layers[:half] if arm == "moextend_first_half" else layers[::2][:half]
    return MoExtendConfig(layers=layers, copy_sources=found.copy_sources(layers), **fields)


def train(
    model: nn.Module,
    rows: Any,
    collate: Any,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Fine-tune what requires a gradient; returns the loss at ten points."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 30),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(model: nn.Module, config: PeftConfig | None) -> nn.Module:
    """The model with an adapter, or with all of its weights to be trained."""
    return model.requires_grad_(True) if config is None else get_peft_model(model, config)


def num_trained(model: nn.Module) -> int:
    """How many parameters train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Comparison:
    """Remembers in `report.json` what is finished, so that an interrupted run goes on from there.

    Args:
        output (`Path`): folder of the report.
        settings (`dict[str, Any]`): what has to be the same for a run to go on.
        restart (`bool`): throw away what an earlier run has left.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, restart: bool = False) -> None:
        if restart:
            shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.file = output / "report.json"
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {"settings": settings}
        if self.found["settings"] != settings:
            sys.exit(f"{output} holds a comparison with other settings: use --restart, or another --output_dir.")

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, or what it has returned in an earlier run."""
        if name in self.found:
            print(f"{name} is finished")
        else:
            print(f"\n{name}", flush=True)
            started = time.perf_counter()
            result = measure()
            self.found[name] = {**result, "seconds": round(time.perf_counter() - started, 1)}
            unfinished = self.file.with_suffix(".tmp")
            unfinished.write_text(json.dumps(self.found, indent=1))
            unfinished.replace(self.file)
        return self.found[name]

    def table(self, metric: str, *, digits: int = 3, larger_is_better: bool = False) -> str:
        """In markdown: `<metric>_old` and `<metric>_new` of each arm, and what it won and lost against the base."""
        sign = 1 if larger_is_better else -1
        base = self.found["base"]
        lines = [
            f"| arm | trained parameters | seconds | {metric}, new | gain | {metric}, old | loss |",
            "|---|---:|---:|---:|---:|---:|---:|",
            f"| base | | {base['seconds']} | {base[f'{metric}_new']:.{digits}f} | "
            f"| {base[f'{metric}_old']:.{digits}f} | |",
        ]
        for name, run in self.found.items():
            if name.partition("/")[0] not in ARMS:
                continue
            new, old = run[f"{metric}_new"], run[f"{metric}_old"]
            gain, loss = sign * (new - base[f"{metric}_new"]), sign * (base[f"{metric}_old"] - old)
            lines.append(
                f"| {name} | {run['trained_parameters']:,} | {run['seconds']} | {new:.{digits}f} | {gain:+.{digits}f} "
                f"| {old:.{digits}f} | {loss:+.{digits}f} |"
            )
        return "\n".join(lines)

    def write(self, title: str, *tables: str) -> None:
        """Print the report, and write it as `report.md` beside the picture of the shift."""
        found = ExtenderReport.from_dict(self.found["extender"])
        found.plot(self.output / "shift.png")
        text = "\n\n".join([f"# {title}", *tables, "## Extender", str(found)]) + "\n"
        (self.output / "report.md").write_text(text)
        print(f"\n{text}\nAll figures are in {self.file}.")


def free_memory() -> None:
    """Give back what the last arm has used on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
