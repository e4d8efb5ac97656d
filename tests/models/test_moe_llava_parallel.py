"""Tensor and expert parallelism over two processes on the CPU: logits and gradients are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import peft_moe
from models.tiny_llava import sparse_llava


pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
        reason="older versions of transformers spell the parallel layout differently",
    ),
]

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from transformers.distributed import DistributedConfig
from models.tiny_llava import image_batch, labels_of
from peft_moe.models import MoeLlavaForConditionalGeneration

torch.set_num_threads(1)
folder, layout, implementation = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
load = MoeLlavaForConditionalGeneration.from_pretrained
split = load(folder, distributed_config=DistributedConfig(**layout), experts_implementation=implementation)
whole = load(folder, experts_implementation=implementation)
batch = image_batch(num_padding=2)
report = {}
with torch.no_grad():
    report["logits"] = float((split(**batch).logits - whole(**batch).logits).abs().max())
experts = split.model.language_model.layers[0].mlp.experts
report["shapes"] = {
    name: list(getattr(p, "to_local", lambda p=p: p)().shape) for name, p in experts.named_parameters()
}
for model in (split, whole):
    model.train()(**batch, labels=labels_of(batch), use_cache=False).loss.backward()
expected = dict(whole.named_parameters())
report["gradients"] = {}
for name, parameter in split.named_parameters():
    if "language_model" in name:
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        error = (gradient - expected[name].grad).abs().max() / expected[name].grad.abs().max()
        report["gradients"][name] = float(error)
dist.barrier()
if dist.get_rank() == 0:
    with open(sys.argv[4], "w") as file:
        json.dump(report, file)
dist.destroy_process_group()
"""
TENSOR = {"tp_size": 2, "tp_plan": "auto"}
EXPERT = {"tp_size": 2, "tp_plan": "auto", "ep_size": 2, "ep_implementation": "all_reduce"}


def in_two_processes(folder: Path, layout: dict, implementation: str) -> dict:
    script, report = folder / "script.py", folder / "report.json"
    script.write_text(SCRIPT)
    paths = [Path(__file__).parent.parent, Path(peft_moe.__file__).parent.parent, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(script), str(folder), json.dumps(layout), implementation, str(report)]
    # judged by the file: gloo sometimes aborts after everything is done
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert report.exists(), run.stderr[-5000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("layout", [TENSOR, EXPERT], ids=["tensor", "expert"])
@pytest.mark.parametrize(
    ("backbone", "implementation"),
    [("llama", "grouped_mm"), ("llama", "eager"), ("nemotron", "grouped_mm"), ("phi", "grouped_mm")],
    ids=["gated", "gated-eager", "plain", "plain-with-bias"],
)
def test_two_processes_equal_one(tmp_path, backbone, implementation, layout):
    sparse_llava(backbone).save_pretrained(tmp_path)
    report = in_two_processes(tmp_path, layout, implementation)
    assert report["logits"] <= 1e-5
    assert {name: error for name, error in report["gradients"].items() if not error <= 1e-4} == {}
    first = "up_proj" if "up_proj" in report["shapes"] else "gate_up_proj"
    rows = 48 if first == "up_proj" else 96
    if layout is EXPERT:
        assert report["shapes"][first] == [2, rows, 32]
    elif backbone == "phi":
        # a bias that every process adds would count twice: these experts are not split
        assert report["shapes"][first] == [4, rows, 32]
    else:
        assert report["shapes"][first] == [4, rows // 2, 32]
