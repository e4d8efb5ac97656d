"""Several processes and one folder: adapters are never half and half. As a script, this file saves and loads them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from train_and_die import forked
from trained import adapter_config, run_script

from tiny_models import tiny_llama


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("other_rank", [2, 3], ids=["weights", "weights-and-configuration"])
def test_what_two_save_into_one_folder_is_all_of_one_or_refused(other_rank, tmp_path):
    run_script("test_several_processes.py", tmp_path / "adapter", tmp_path / "results.json", other_rank)
    found = set(json.loads((tmp_path / "results.json").read_text()))
    whole = {"rank 2, values [1.0]", f"rank {other_rank}, values [2.0]"}
    assert found & whole
    assert all("values" not in said or said in whole for said in found), found


def save_for_ever(folder: Path, rank: int, value: float) -> None:
    model = get_peft_model(tiny_llama(num_hidden_layers=1), adapter_config(r=rank))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    while True:
        model.save_pretrained(folder)


def look(folder: Path) -> str:
    """Whose adapter it is, or what is said about it."""
    try:
        model = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), str(folder))
    except Exception as error:
        return type(error).__name__
    rank = model.peft_config["default"].r
    values = {float(v) for n, p in model.named_parameters() if ".mole_" in n for v in (p.min(), p.max())}
    return f"rank {rank}, values {sorted(values)}"


def main(folder: str, results_file: str, other_rank: str) -> None:
    """Two processes save different adapters into one folder again and again, and this one loads."""
    torch.set_num_threads(1)
    children = [forked(lambda: save_for_ever(Path(folder), 2, 1.0))]
    children += [forked(lambda: save_for_ever(Path(folder), int(other_rank), 2.0))]
    found, until = {}, time.monotonic() + 8
    while time.monotonic() < until:
        said = look(Path(folder))
        found[said] = found.get(said, 0) + 1
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Path(results_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
