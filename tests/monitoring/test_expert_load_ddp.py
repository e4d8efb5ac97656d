"""Counts are those of all processes: two real ones, judged by the file that each of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).parent / "ddp_worker.py"


def run_two_processes(output_dir: Path) -> list[dict]:
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run([*command, str(output_dir)], env=environment, capture_output=True, text=True, timeout=500)
    files = [output_dir / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


def total(*tables: dict[str, list[int]]) -> dict[str, list[int]]:
    return {
        name: [sum(counts) for counts in zip(*(table[name] for table in tables), strict=True)] for name in tables[0]
    }


@pytest.mark.slow
def test_two_processes_count_what_both_saw(tmp_path):
    ranks = run_two_processes(tmp_path)
    assert [rank.pop("gathered") for rank in ranks] == [[["", 0.1, None], ["ü" * 1000, 0.1, None]]] * 2
    assert [result["world_size"] for rank in ranks for result in rank.values()] == [2] * 6
    first, second = (rank["none"] for rank in ranks)
    assert first["hand"]["train"] != second["hand"]["train"]
    assert first["train"] == second["train"] == total(first["hand"]["train"], second["hand"]["train"])
    assert first["eval"] == second["eval"] == total(first["hand"]["eval"], second["hand"]["eval"])
    assert first["chess_entropy"] == second["chess_entropy"]
    assert len(first["logs"]) == len(second["logs"]) == 2
    for entry, entry_of_second, begin in zip(first["logs"], second["logs"], (0, 4), strict=True):
        both = first["aux_losses"][begin : begin + 4] + second["aux_losses"][begin : begin + 4]
        assert entry["aux_loss"] == entry_of_second["aux_loss"] == pytest.approx(sum(both) / 8, rel=1e-5)
    written = json.loads((tmp_path / "none" / "expert_load.json").read_text())["train"]["counts"]["default"]
    assert {router: domains["train"]["all"] for router, domains in written.items()} == first["train"]
    for rank in ranks:
        assert rank["non_reentrant"]["train"] == rank["reentrant"]["train"] == first["train"]
