"""Several processes and one folder: adapters are never half and half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_moe


HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(peft_moe.__file__).parents[1]), str(HERE.parent), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def saved_together(folder: Path, other_rank: int) -> set[str]:
    """Everything that was found in a folder into which two processes save."""
    results = folder / "results.json"
    command = [sys.executable, str(HERE / "save_together.py"), str(folder / "adapter"), str(results), str(other_rank)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(results.read_text()))


def test_weights_of_two_that_save_into_one_folder_are_all_of_one_or_refused(tmp_path):
    found = saved_together(tmp_path, other_rank=2)
    whole = {"rank 2, values [1.0]", "rank 2, values [2.0]"}
    assert found & whole
    assert all("values" not in said or said in whole for said in found), found


def test_weights_and_configuration_of_two_are_refused_where_they_do_not_fit(tmp_path):
    found = saved_together(tmp_path, other_rank=3)
    whole = {"rank 2, values [1.0]", "rank 3, values [2.0]"}
    assert found & whole
    assert all("values" not in said or said in whole for said in found), found
