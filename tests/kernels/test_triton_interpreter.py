"""What of Triton needs no GPU: choice of a path, the launcher, and all programs in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_moe.kernels import Case
from peft_moe.kernels.backends import triton as backend
from peft_moe.kernels.triton.paths import path_of
from peft_moe.kernels.triton.tiles import Tiles, launch


pytest.importorskip("triton", reason="the interpreter is part of the package triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("num_tokens", "tokens_per_example", "num_experts", "top_k", "rank", "path"),
    [
        (1, 1, 8, 2, 16, "decode"),
        (32, 1, 8, 2, 64, "decode"),
        (33, 1, 8, 2, 32, "dense"),  # more pairs
        (33, 1, 8, 2, 33, "sorted"),
        (65, 1, 8, 1, 16, "dense"),
        (65, 1, 8, 1, 17, "sorted"),
        (32, 1, 8, 2, 65, "sorted"),  # wider experts
        (0, 1, 8, 2, 4096, "decode"),
        (64, 32, 64, 1, 8, "decode"),
        (64, 32, 64, 2, 8, "examples"),
        (64, 16, 4, 2, 8, "examples"),
        (60, 15, 64, 2, 8, "sorted"),  # examples shorter than a tile
        (60, 15, 4, 2, 8, "dense"),
        (512 * 16, 16, 64, 2, 8, "examples"),
        (513 * 16, 16, 64, 2, 8, "sorted"),  # too many choices to walk through
    ],
)
def test_the_shape_decides_about_the_path(num_tokens, tokens_per_example, num_experts, top_k, rank, path):
    assert path_of(num_tokens, tokens_per_example, num_experts, top_k, rank) == path


def test_the_backend_names_the_path(monkeypatch):
    monkeypatch.setattr(backend, "is_interpreted", lambda: True)
    facts = Case(1, 64, 64, 8, 16, 2, torch.float32, "cpu")
    assert "'decode'" in backend.supports(facts)[1]
    assert "'dense'" in backend.supports(facts._replace(num_tokens=100))[1]
    assert "'sorted'" in backend.supports(facts._replace(num_tokens=100, rank=64))[1]


def test_a_program_starts_on_the_device_of_its_tensors_with_its_arguments_in_order(monkeypatch):
    events, tensor = [], torch.empty(1)

    class Program:
        arg_names = ("x", "K", "HAS_X", "HAS_BIAS")

        def __getitem__(self, grid):
            return lambda *given, **options: events.append((grid, given, options))

    class Device:
        def __init__(self, on):
            assert on is tensor

        def __enter__(self):
            events.append("there")

        def __exit__(self, *error):
            events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    launch(Program(), (3,), Tiles(1, 1, 4, 2), tensor, {"K": 2, "bias": None, "x": tensor})
    assert events == ["there", ((3,), (tensor, 2, True, False), {"num_warps": 4, "num_stages": 2}), "left"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "least"),
    [
        (["test_conformance.py", "-k", "triton"], 90),
        (["interpreted.py", "-k", "not wrong and not dtype1 and not compiled_graphs"], 60),
        (["interpreted.py", "-k", "wrong"], 32),
        pytest.param(["interpreted.py", "-k", "dtype1 or compiled_graphs"], 12, marks=pytest.mark.exhaustive),
        (["interpreted_ffn.py", "-m", "not exhaustive"], 40),
        pytest.param(["interpreted_ffn.py", "-m", "exhaustive"], 65, marks=pytest.mark.exhaustive),
    ],
    ids=["conformance", "beyond", "mutations", "float16-and-compiled", "ffn-experts", "more-of-ffn-experts"],
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
