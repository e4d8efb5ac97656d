"""Starts a script in several processes, and reads what each of them has written to a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


TESTS = Path(__file__).parent.parent


def launch(
    script: Path,
    folder: Path,
    num_processes: int,
    *arguments: Any,
    paths: Sequence[Path] = (),
    accelerate: Path | None = None,
    timeout_s: int = 400,
) -> list[dict[str, Any]]:
    """Run `script folder *arguments` in `num_processes` processes, and return the report of each rank.

    Args:
        paths: put behind everything else on the path.
        accelerate: a configuration for `accelerate launch`; without it torchrun starts the processes.
        timeout_s: of the whole run, in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(map(str, [TESTS, TESTS / "distributed", *sys.path, *paths]))
    command = [sys.executable]
    if accelerate is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(accelerate), "--main_process_port=0"]
    elif num_processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    run = subprocess.run(
        [*command, str(script), str(folder), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    # judged by the files that the ranks write: gloo sometimes aborts after everything is done
    files = [folder / f"rank{rank}.pt" for rank in range(num_processes)]
    assert all(file.is_file() for file in files), run.stdout[-2000:] + run.stderr[-5000:]
    reports = [torch.load(file, weights_only=True) for file in files]
    assert [report["world_size"] for report in reports] == [num_processes] * num_processes
    return reports


def rank_of_this_process() -> int:
    """0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def write_report(folder: str | Path, report: dict[str, Any]) -> None:
    """Called by every rank at its end."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    file = Path(folder) / f"rank{rank_of_this_process()}.pt"
    torch.save({**report, "world_size": world_size}, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
