"""Runs a script in a fresh process whose Hub is the server of the tests.

`huggingface_hub` reads its environment while it is imported, so that a process is needed for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hub_server import TOKEN, HubServer


TESTS = Path(__file__).parents[1]


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Nothing of the caller's settings of Hugging Face, and a cache that is empty: a full one would answer instead."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    package = find_spec("peft_moe")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parents[1]
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (source, TESTS, TESTS / "hub"))),
    }


def run_script(hub: HubServer, name: str, folder: Path, home: Path) -> dict[str, Any]:
    """What the script `name` hands to `outcomes.finish`.

    Raises:
        AssertionError: the script failed.
    """
    run = subprocess.run(
        [sys.executable, str(TESTS / "hub" / name), str(folder)],
        env=environment(hub, home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, f"{run.stderr}\nunhandled: {hub.unhandled}"
    return json.loads((folder / name).with_suffix(".json").read_text())
