"""Script: runs of a tiny training on a disk of its own that fills up while checkpoint-4 is saved.

    python fill_the_disk.py folder results.json

`folder` is on a small file system. Each run is a fork, see `train_and_die.py`.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from train_and_die import exit_code, forked, train
from transformers import Trainer

from peft_moe import find_intact_checkpoint


PAGE = 4096


def fill(disk: Path, num_bytes_left: int) -> None:
    """Leave this much room on the disk."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        os.ftruncate(file.fileno(), max(0, file.tell() - num_bytes_left) // PAGE * PAGE)


def fill_before_the_second_save(disk: Path, num_bytes_left: int) -> None:
    original = Trainer._save_checkpoint

    def save(self: Trainer, *args: Any) -> None:
        if self.state.global_step == 4:
            fill(disk, num_bytes_left)
        original(self, *args)

    Trainer._save_checkpoint = save


def run(disk: Path, num_bytes_left: int, results: Path) -> dict[str, Any]:
    """A run that has this much room for its second checkpoint, and one that resumes when there is room again."""
    folder = disk / str(num_bytes_left)

    def first() -> None:
        fill_before_the_second_save(disk, num_bytes_left)
        error = None
        try:
            train(folder, limit=1, resume=False)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        (disk / "filler").unlink(missing_ok=True)
        found = find_intact_checkpoint(folder)
        results.write_text(json.dumps({"error": error, "found": found and Path(found).name}))

    assert exit_code(forked(first)) == 0
    outcome = json.loads(results.read_text())
    assert exit_code(forked(lambda: train(folder, limit=1, resume=True))) == 0
    outcome["weights"] = json.loads((folder / "result.json").read_text())["weights"]
    shutil.rmtree(folder)
    return outcome


def main(folder: str, results_file: str, *rooms: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    disk, results = Path(folder), Path(results_file)
    gc.freeze()
    found = {room: run(disk, int(room), results) for room in rooms}
    assert exit_code(forked(lambda: train(disk / "whole", limit=1, resume=False))) == 0
    found["uninterrupted"] = json.loads((disk / "whole" / "result.json").read_text())
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
