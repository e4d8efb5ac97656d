"""Two processes train as one does: same gradients of task and auxiliary loss, same weights on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "train_ddp.py"


def run(folder, num_processes, *, coef=0.5, checkpointing="none", find_unused="default", accumulation=1):
    return launch(SCRIPT, folder, num_processes, coef, checkpointing, find_unused, accumulation)


def run_mocle(folder, num_processes, *, checkpointing, find_unused="default", scope="model", accumulation=1):
    script = SCRIPT.parent / "train_mocle.py"
    return launch(script, folder, num_processes, checkpointing, find_unused, scope, accumulation)


def run_moextend(folder, num_processes, *, checkpointing, coef=0.5, find_unused="default", accumulation=1):
    script = SCRIPT.parent / "train_moextend.py"
    return launch(script, folder, num_processes, coef, checkpointing, find_unused, accumulation)


def exhaustive(*values):
    """What `test_wrapped.py` shows too, without a `Trainer`."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("checkpointing", ["none", exhaustive("non_reentrant"), exhaustive("reentrant")])
def test_two_ranks_train_like_one_process(tmp_path, checkpointing):
    unused = "no" if checkpointing == "reentrant" else "default"
    settings = {"checkpointing": checkpointing, "find_unused": unused}
    first, second = run(tmp_path / "two", 2, accumulation=2, **settings)
    (single,) = run(tmp_path / "one", 1, accumulation=4, **settings)
    (task_only,) = run(tmp_path / "task", 1, accumulation=4, coef=0.0, **settings)
    assert first["error"] is None and second["error"] is None and single["error"] is None
    assert torch.equal(first["weights"], second["weights"])
    aux = single["gradient"] - task_only["gradient"]
    assert aux.norm() > 1e-3
    difference = first["gradient"] - single["gradient"]
    assert difference.norm() < 1e-5 * single["gradient"].norm()
    assert difference.norm() < 1e-3 * aux.norm()
    torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-5, atol=1e-5)


def test_reentrant_checkpointing_with_find_unused_parameters_is_refused(tmp_path):
    for report in run(tmp_path / "two", 2, checkpointing="reentrant", find_unused="yes"):
        assert "use_reentrant" in report["error"] and "ddp_find_unused_parameters=False" in report["error"]


MOCLE_SETTINGS = {
    "non-reentrant": {"checkpointing": "non_reentrant"},
    "reentrant": {"checkpointing": "reentrant", "find_unused": "no", "scope": "layer"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", MOCLE_SETTINGS.values(), ids=MOCLE_SETTINGS)
def test_two_ranks_train_mocle_like_one_process(tmp_path, settings):
    first, second = run_mocle(tmp_path / "two", 2, accumulation=2, **settings)
    (single,) = run_mocle(tmp_path / "one", 1, accumulation=4, **settings)
    assert first["error"] is None and second["error"] is None and single["error"] is None
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_of_shared_cluster_embeddings_is_refused(tmp_path):
    for report in run_mocle(tmp_path / "two", 2, checkpointing="reentrant", find_unused="no"):
        assert "use_reentrant" in report["error"] and "cluster_embedding_scope='layer'" in report["error"]


MOEXTEND_SETTINGS = {
    "non-reentrant": {"checkpointing": "non_reentrant"},
    # nothing is searched, so that each parameter has to get a gradient on each rank
    "reentrant": {"checkpointing": "reentrant", "find_unused": "no"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", MOEXTEND_SETTINGS.values(), ids=MOEXTEND_SETTINGS)
def test_two_ranks_train_new_experts_like_one_process(tmp_path, settings):
    first, second = run_moextend(tmp_path / "two", 2, accumulation=2, **settings)
    (single,) = run_moextend(tmp_path / "one", 1, accumulation=4, **settings)
    (task_only,) = run_moextend(tmp_path / "task", 1, accumulation=4, coef=0.0, **settings)
    assert first["error"] is None and second["error"] is None and single["error"] is None
    assert first["is_base_untouched"] and second["is_base_untouched"]
    pairs = [(a, b) for name, counts in first["chosen"].items() for a, b in zip(counts, second["chosen"][name])]
    assert any(a and not b for a, b in pairs), f"each expert got tokens of both ranks: {pairs}"
    assert torch.equal(first["weights"], second["weights"])
    aux = single["gradient"] - task_only["gradient"]
    assert aux.norm() > 1e-3
    difference = first["gradient"] - single["gradient"]
    assert difference.norm() < 1e-5 * single["gradient"].norm()
    assert difference.norm() < 1e-3 * aux.norm()
    torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-5, atol=1e-5)
