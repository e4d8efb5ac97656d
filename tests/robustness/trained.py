"""What tests of this folder share: a tiny MoLE adapter in training, scripts in processes, an evil pickle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import peft_moe
from peft_moe import MoLEConfig
from tiny_models import tiny_llama, token_batch


HERE = Path(__file__).parent
FUZZ: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def run_script(name: str, *arguments: object) -> str:
    """Run a script of this folder in a process of its own; what it has written to stderr."""
    folders = (Path(peft_moe.__file__).parents[1], HERE.parent, HERE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stderr


def adapter_config(**overrides: Any) -> MoLEConfig:
    """Three experts that draw random numbers in training."""
    fields = {"num_experts": 3, "r": 2, "lora_dropout": 0.1, "router_jitter_noise": 0.05, "task_type": "CAUSAL_LM"}
    return MoLEConfig(**{**fields, **overrides})


def trainer(
    output_dir: str | os.PathLike[str],
    *callbacks: TrainerCallback,
    adapters: tuple[str, ...] = ("default",),
    full: bool = False,
    **overrides: Any,
) -> Trainer:
    """A plain trainer that saves at steps 2 and 4."""
    base = tiny_llama(num_hidden_layers=1)
    torch.manual_seed(0)
    model = base if full else get_peft_model(base, adapter_config(), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, adapter_config())
    batch = token_batch(12, num_padding=0)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(12)]
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(output_dir), **{**settings, **overrides})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))
