"""The Triton programs compute what the oracle says, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="the interpreter is part of the package triton")

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "least"),
    [(["test_conformance.py", "-k", "triton"], 90), (["interpreted.py"], 29)],
    ids=["conformance", "beyond"],
)
def test_everything_in_the_interpreter(files, least):
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", str(HERE / files[0]), *files[1:], "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    summary = run.stdout[-6000:]
    assert run.returncode == 0, summary
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= least, summary
