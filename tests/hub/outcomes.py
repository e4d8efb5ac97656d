"""What two processes say to each other: inputs and logits as files, and how a load ended. Imports no `peft_moe`."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


FOLDER = Path(sys.argv[1])
"""What the processes share besides the Hub."""
EQUAL = "equal"


def expect(name: str, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Write down what `model` says about `batch`; it is to be loaded elsewhere and to say the same."""
    logits = _logits(model, batch)
    safetensors.torch.save_file({**batch, "expected": logits}, FOLDER / f"{name}.safetensors")
    return logits


def compare(name: str, load: Callable[[], torch.nn.Module]) -> str:
    """`EQUAL` if what `load` gives says to the bit what the pushed model says; or what happened instead."""
    batch = safetensors.torch.load_file(FOLDER / f"{name}.safetensors")
    expected = batch.pop("expected")
    try:
        found = _logits(load(), batch)
    except Exception:
        return traceback.format_exc()
    return EQUAL if torch.equal(found, expected) else f"differs by {(found - expected).abs().max()}"


def error_of(call: Callable[[], Any]) -> str:
    """The class and the message of what `call` raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def finish(results: dict[str, Any]) -> None:
    """Hand the results to the test; standard output belongs to whatever the libraries print."""
    FOLDER.joinpath(f"{Path(sys.argv[0]).stem}.json").write_text(json.dumps(results))


def _logits(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits.contiguous()
