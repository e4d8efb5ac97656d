"""A training that is killed while it saves goes on from the newest whole checkpoint, and ends with equal weights."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from trained import run_script


UNINTERRUPTED = {"name": "uninterrupted", "limit": None, "die_at": None, "when": None}


def at(name: str, when: str, step: int, *, more: bool = False) -> Any:
    """A point to die at, and the newest checkpoint that is whole then; `more` for what others show already."""
    killed = {"name": f"{when} {name}", "limit": 1, "die_at": name, "when": when}
    return pytest.param(killed, step, id=killed["name"], marks=[pytest.mark.exhaustive] if more else [])


def run(jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the script says about each job."""
    jobs = [{**entry, "folder": str(folder / str(number))} for number, entry in enumerate(jobs)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    stderr = run_script("train_and_die.py", folder / "jobs.json", folder / "results.json")
    return {"stderr": stderr, **json.loads((folder / "results.json").read_text())}


FOUR = "checkpoint-4"
KILLED = [
    at(f"{FOUR}/adapter_model.safetensors", "before", 2, more=True),
    at(f"{FOUR}/adapter_model.safetensors", "middle of", 2),
    at(f"{FOUR}/adapter_model.safetensors", "after", 2, more=True),
    at(f"{FOUR}/training_args.bin", "middle of", 2, more=True),
    at(f"{FOUR}/optimizer.pt", "middle of", 2),
    at(f"{FOUR}/optimizer.pt", "after", 2, more=True),
    at(f"{FOUR}/scheduler.pt", "middle of", 2, more=True),
    at(f"{FOUR}/rng_state.pth", "middle of", 2, more=True),
    at(f"{FOUR}/rng_state.pth", "after", 2, more=True),
    at(f"{FOUR}/trainer_state.json", "middle of", 2),
    at(f"{FOUR}/trainer_state.json", "after", 4),
    # the rotation of Trainer, after trainer_state.json
    at("checkpoint-2", "before", 4, more=True),
    at("checkpoint-2", "middle of", 4),
    at("checkpoint-2", "after", 4, more=True),
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[str, Any]:
    """What became of the jobs of all tests that run."""
    items = [item for item in request.session.items if item.fspath == request.fspath]
    jobs = [item.callspec.params["killed"] for item in items if "killed" in getattr(item, "fixturenames", ())]
    return run([UNINTERRUPTED, *jobs], tmp_path_factory.mktemp("killed"))


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "step"), KILLED)
def test_killed_at_a_point_of_a_save(killed, step, results):
    found = results[killed["name"]]
    assert found["died"] == -signal.SIGKILL
    assert found["finished"] == 0, results["stderr"]
    assert found["resumed"] == f"checkpoint-{step}"
    skipped = [
        re.fullmatch(r"Skipped .*checkpoint-(\d)', which is not whole: .*\.", said)[1] for said in found["skipped"]
    ]
    assert skipped == (["4"] if step == 2 else [])
    assert found["weights"] == results["uninterrupted"]["weights"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_at_random_times_again_and_again(tmp_path):
    jobs = [UNINTERRUPTED, *({"name": str(seed), "seed": seed, "limit": 2} for seed in range(8))]
    results = run(jobs, tmp_path)
    for seed in range(8):
        assert results[str(seed)]["finished"] == 0, results["stderr"]
        assert results[str(seed)]["weights"] == results["uninterrupted"]["weights"]
    assert sum(results[str(seed)]["kills"] for seed in range(8)) > 8
