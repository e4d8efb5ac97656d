"""What the tests of `cluster_ids` call, and with what: models with MoCLE, prompts, greedy generation."""

from __future__ import annotations

import torch
from peft import PeftModel
from test_mocle_formula import build
from torch import nn

from tiny_architectures import ARCHITECTURES
from tiny_models import token_batch


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompt(batch_size: int = 3) -> torch.Tensor:
    return token_batch(batch_size, num_padding=0)["input_ids"]


def architecture(name: str):
    (found,) = [entry for entry in ARCHITECTURES if entry.name == name]
    return found


def wrap(model: nn.Module, **settings) -> PeftModel:
    return build(model, **{"task_type": None, **settings})
