"""A disk that fills up while a checkpoint is saved: an error, and the checkpoint before is as good as it was."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import peft_moe


SCRIPT = Path(__file__).parent / "fill_the_disk.py"
# a page at a time up to more than a checkpoint: each file of it is once the one that does not fit
ROOMS = [str(4096 * pages) for pages in range(28)]
# what safetensors and python say, and what torch.save says, which does not name the disk
CAUSES = ("No space left on device", "inline_container.cc", "iostream error")


def with_a_small_disk(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a file system of 2 MB of its own at `folder`, which needs no rights."""
    mount = f"mount -t tmpfs -o size=2m tmpfs {shlex.quote(str(folder))} && exec {shlex.join(command)}"
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_moe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            ["unshare", "-Urm", "sh", "-c", mount], env=environment, capture_output=True, text=True, timeout=500
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess([], 1, "", str(error))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_whatever_does_not_fit_the_checkpoint_before_is_taken_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = with_a_small_disk(["true"], disk)
    if probe.returncode:
        pytest.skip(f"an unprivileged process may not mount a file system here: {probe.stderr.strip()}")
    results = tmp_path / "results.json"
    done = with_a_small_disk([sys.executable, str(SCRIPT), str(disk), str(results), *ROOMS], disk)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    failed = [room for room in ROOMS if found[room]["error"]]
    assert failed == ROOMS[: len(failed)] and len(ROOMS) > len(failed) > 10
    for room in ROOMS:
        outcome = found[room]
        assert outcome["weights"] == found["uninterrupted"]["weights"]
        assert outcome["found"] in (("checkpoint-2", "checkpoint-4") if room in failed else ("checkpoint-6",))
        assert room not in failed or any(cause in outcome["error"] for cause in CAUSES), outcome["error"]
