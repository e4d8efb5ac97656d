"""Runs the scripts of the examples as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess:
    """A script below `examples/`, or `-c` and code; fails with what it wrote to stderr, if it may not fail."""
    first = command[0] if command[0] == "-c" else EXAMPLES / str(command[0])
    result = subprocess.run(
        [sys.executable, str(first), *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=500,
        env=ENVIRONMENT,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result
