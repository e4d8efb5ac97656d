"""Script: trains a tiny MoLE adapter in processes that kill themselves while saving, and in others that resume.

    python train_and_die.py jobs.json results.json

One process imports everything, and each run is a fork of it, which has its own memory and dies its own death.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers
from trained import trainer
from transformers import TrainerState

from peft_moe import ExpertLoadCallback, find_intact_checkpoint


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut_in_half(path: Path) -> None:
    """What the call has left when it is killed in the middle: half of the file, or half of the files."""
    if path.is_dir():
        for file in sorted(path.iterdir())[::2]:
            file.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)


# name of a file or folder in the path that a call gets → what writes or removes it, and which argument the path is
CALLS: dict[str, tuple[Any, str, int]] = {
    "checkpoint-4/adapter_model.safetensors": (peft.peft_model, "safe_save_file", 1),
    "checkpoint-4/training_args.bin": (torch, "save", 1),
    "checkpoint-4/optimizer.pt": (torch, "save", 1),
    "checkpoint-4/scheduler.pt": (torch, "save", 1),
    "checkpoint-4/rng_state.pth": (torch, "save", 1),
    "checkpoint-4/trainer_state.json": (TrainerState, "save_to_json", 1),
    "checkpoint-2": (shutil, "rmtree", 0),
}


def die_at(name: str, when: str) -> None:
    """Let this process be killed `before`, in the `middle of` or `after` the call that has to do with `name`."""
    owner, function, position = CALLS[name]
    original: Callable[..., Any] = getattr(owner, function)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        path = Path(args[position]) if len(args) > position and isinstance(args[position], str | Path) else Path()
        if not path.as_posix().endswith(f"/{name}"):
            return original(*args, **kwargs)
        if when == "middle of" and path.is_dir():
            cut_in_half(path)
        elif when != "before":
            original(*args, **kwargs)
            if when == "middle of":
                cut_in_half(path)
        kill_self()

    setattr(owner, function, deadly)


def train(folder: Path, *, limit: int | None, resume: bool) -> None:
    """Train, from the newest intact checkpoint if there is one, and leave a hash of the weights."""
    training = trainer(folder, ExpertLoadCallback(), max_steps=6, save_total_limit=limit)
    skipped: list[str] = []
    logging.getLogger("peft_moe.checkpoints").addFilter(lambda record: skipped.append(record.getMessage()) or True)
    found = find_intact_checkpoint(folder) if resume else None
    training.train(resume_from_checkpoint=found)
    digest = hashlib.sha256()
    for name, parameter in sorted(training.model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    resumed = None if found is None else Path(found).name
    result = {"resumed": resumed, "skipped": skipped, "weights": digest.hexdigest()}
    (folder / "result.json").write_text(json.dumps(result))


def forked(function: Callable[[], None]) -> int:
    """Start `function` in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def exit_code(child: int) -> int:
    """Wait for a process; negative if a signal has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_and_resume(job: dict[str, Any]) -> dict[str, Any]:
    """One run that dies at a point, and one that takes it up."""
    folder, limit = Path(job["folder"]), job["limit"]

    def first() -> None:
        if job["die_at"]:
            die_at(job["die_at"], job["when"])
        train(folder, limit=limit, resume=False)

    died = exit_code(forked(first))
    finished = exit_code(forked(lambda: train(folder, limit=limit, resume=True))) if job["die_at"] else died
    result = json.loads((folder / "result.json").read_text()) if not finished else {}
    return {"died": died, "finished": finished, **result}


def run_until_done(job: dict[str, Any]) -> dict[str, Any]:
    """Runs that are killed from outside after random times, each taking up what the one before has left."""
    folder, kills = Path(job["folder"]), 0
    generator = random.Random(job["seed"])
    while True:
        child = forked(lambda: train(folder, limit=job["limit"], resume=True))
        # after eight deaths it may live, so that the test ends
        if kills < 8:
            time.sleep(generator.uniform(0.05, job["seconds"]))
            os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        if code != -signal.SIGKILL:
            return {"finished": code, "kills": kills, **json.loads((folder / "result.json").read_text())}
        kills += 1


def main(jobs_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder).model.save_pretrained(folder)  # what this caches, and garbage, need not be made in each fork
    gc.freeze()
    results, seconds = {}, 1.0
    for job in json.loads(Path(jobs_file).read_text()):
        start = time.perf_counter()
        run = run_until_done if "seed" in job else run_and_resume
        results[job["name"]] = run({"seconds": seconds, **job})
        if not job.get("die_at", True):  # how long a run takes that nothing kills
            seconds = time.perf_counter() - start
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
