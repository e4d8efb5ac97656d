"""The benchmark of the kernels runs from end to end, also what is for CUDA only, and times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import contenders
import cuda_stand_in
import lora_experts as benchmark
import plot
import pytest
import regret
import report
import result_file
import roofline
import timing
import torch
from shapes import CUDA, DEFAULT, QUICK, Shape

from peft_moe.kernels import BACKENDS, backends
from peft_moe.kernels.backends import triton as triton_backend


SMALL = Shape(16, 24, 12, 3, 8, 2)


@pytest.fixture(autouse=True)
def no_remembered_choice():
    """`choose` keeps backends, some tests replace one."""
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    """The command, in this process, and what it wrote."""
    given = ["--quick", "--name", "found", "--results", str(tmp_path), "--seconds", "0", *arguments]
    monkeypatch.setattr(sys, "argv", ["benchmarks/lora_experts.py", *given])
    monkeypatch.setattr(benchmark, "MAX_ROUNDS", 2)
    benchmark.main()
    return json.loads((tmp_path / "found.json").read_text())


def options(**changed) -> object:
    namespace = benchmark.argparse.Namespace(device="cpu", backends=None, compiler="aot_eager", seconds=0.0)
    vars(namespace).update(changed)
    return namespace


@pytest.mark.slow
def test_every_contender_of_every_quick_shape_has_a_time(monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, tmp_path, "--num_compiled", "1", "--compiler", "aot_eager")
    assert [Shape(**cell["shape"]) for cell in result["cells"]] == QUICK
    able = {name for name, backend in BACKENDS.items() if backend.is_usable()[0]} - {"plain"}
    for cell in result["cells"]:
        assert {"base", "base_again", "peft_r", "plain_r", "loop", "auto", *able} <= set(cell["median_ms"])
        assert all(math.isfinite(ms) and ms > 0 for ms in cell["median_ms"].values())
        assert set(cell["peak_mib"]) == set(cell["median_ms"]) and not cell["wrong"]
        assert cell["graph_median_ms"] == {} and "graphs are captured on CUDA only" in cell["not_captured"]["base"]
    assert "peft_r_compiled" in result["cells"][0]["median_ms"]
    assert result["ceilings"]["tflops"] > 0 and result["hardware"]["device"] == "cpu"
    printed = capsys.readouterr().out
    assert "not run: scattermoe: ModuleNotFoundError" in printed and "TFLOP/s" in printed


@pytest.mark.slow
def test_what_runs_on_cuda_only_runs_on_its_stand_in(monkeypatch):
    cuda_stand_in.install(monkeypatch)
    clock = timing.CudaClock(device="cpu")
    monkeypatch.setattr(benchmark, "MAX_ROUNDS", 2)
    cell = benchmark.measure(SMALL, torch.float32, clock, options(), compiled=False)
    assert set(cell["graph_median_ms"]) == set(cell["median_ms"]) - set(cell["not_captured"])
    assert {"base", "peft_r", "dense", "grouped_mm"} <= set(cell["graph_median_ms"])
    assert "waits for the device" in cell["not_captured"]["eager"]
    assert set(cell["peak_mib"].values()) == {2.0}


def test_triton_is_also_timed_with_a_sort_where_it_needs_none(monkeypatch):
    """On a stand-in for the programs that notes the path of each step."""
    taken = []

    def forward(x):
        taken.append(triton_backend.path_of(40, 1, 3, 2, 8))
        return x * 1.0

    monkeypatch.setattr(contenders, "can_run", lambda problem, name: name == "triton")
    monkeypatch.setattr(
        contenders, "ours", lambda problem, name: contenders.Contender(forward, [problem.hidden_states])
    )
    problem = contenders.make_problem(SMALL._replace(num_tokens=40, out_features=16), torch.float32)
    entries = contenders.contenders(problem)
    for name in ("triton", "triton_sorted", "triton"):
        benchmark.step(problem, entries[name])
    assert taken == ["dense", "sorted", "dense"]


def test_a_graph_that_replays_something_else_has_no_time(monkeypatch):
    cuda_stand_in.install(monkeypatch)
    problem = contenders.make_problem(SMALL, torch.float32)
    runs = benchmark.steps(problem, {"base": contenders.base_alone(problem)})
    monkeypatch.setattr(cuda_stand_in.CUDAGraph, "replay", lambda self: None)
    replays, reasons = benchmark.graphs(problem, runs, set(), timing.CudaClock(device="cpu"))
    assert not replays and "a replay differs from a call by nan" in reasons["base"]


def test_a_wrong_backend_has_no_time_and_the_command_fails(monkeypatch, tmp_path, capsys):
    dense = BACKENDS["dense"]
    wrong = dataclasses.replace(dense, run=lambda *given: dense.run(*given) * 1.001)
    monkeypatch.setitem(BACKENDS, "dense", wrong)
    monkeypatch.setattr(benchmark, "QUICK", QUICK[:1])
    with pytest.raises(SystemExit, match="differ from eager: dense at 64x96"):
        run(monkeypatch, tmp_path)
    (cell,) = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert "dense" not in cell["median_ms"] and cell["wrong"]["dense"] > 1e-5 and "grouped_mm" in cell["median_ms"]


def test_a_backend_that_raises_is_reported_and_the_others_are_timed(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(BACKENDS, "dense", dataclasses.replace(BACKENDS["dense"], run=fail))
    monkeypatch.setattr(benchmark, "QUICK", QUICK[:1])
    (cell,) = run(monkeypatch, tmp_path)["cells"]
    assert cell["not_run"]["dense"] == "RuntimeError: no such kernel" and "grouped_mm" in cell["median_ms"]


def test_a_run_that_is_cut_off_keeps_its_cells(monkeypatch, tmp_path):
    def measure(shape, *_):
        if shape == QUICK[2]:
            raise KeyboardInterrupt
        return {"shape": shape._asdict()}

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path)
    assert len(json.loads((tmp_path / "found.json").read_text())["cells"]) == 2


def test_no_cell_begins_when_the_time_is_up(tmp_path, monkeypatch):
    now = [0.0]

    def measure(shape, *_):
        now[0] += 10.0
        return {}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: now[0])
    result, given = {"cells": []}, options(quick=True, dtype="float32", total_seconds=25.0, match="", num_compiled=0)
    vars(given).update(results=tmp_path, name="found")
    benchmark.run_cells(result, given)
    assert len(result["cells"]) == 2 and result["not_reached"] == [str(shape) for shape in QUICK[2:]]


def test_shapes_are_distinct_and_hold_what_the_targets_ask_for():
    assert len(set(CUDA)) == len(CUDA) and len(set(DEFAULT)) == len(DEFAULT)
    cells = [{"shape": shape._asdict(), "kind": shape.kind} for shape in CUDA]
    for target in report.CUDA_TARGETS:
        assert any(target.belongs(cell) for cell in cells[:11]), f"{target.what}: asked too late or never"


def test_the_floor_counts_each_product_and_each_tensor_once():
    training, forward = roofline.floor(SMALL, 2), roofline.floor(SMALL._replace(forward_only=True), 2)
    assert forward["flops"] == 2 * 12 * 16 * 24 + 2 * 12 * 2 * 8 * (16 + 24)
    assert training["flops"] == 4 * 12 * 16 * 24 + 6 * 12 * 2 * 8 * (16 + 24)
    assert forward["bytes"] == 2 * (12 * 16 + 16 * 24 + 3 * 8 * 40 + 12 * 24)
    ceilings = {"tflops": 1e-6, "gb_per_s": 1e9}
    assert roofline.floor_ms(training, ceilings) == pytest.approx(training["flops"] / 1e6 * 1e3)


def test_targets_are_judged_by_the_device_of_the_result(capsys):
    times = {"auto": 0.8, "peft_r": 1.0, "peft_kr": 1.0, "base": 0.7, "eager": 2.0, "triton": 0.8}
    shape = CUDA[1]
    cell = {
        "shape": shape._asdict(),
        "kind": shape.kind,
        "auto": "triton",
        "median_ms": times,
        "iqr_ms": dict.fromkeys(times, 0.0),
        "graph_median_ms": {},
        "peak_mib": dict.fromkeys(times, 1e4),
        "floor": roofline.floor(shape, 2),
    }
    ceilings = {"tflops": 700.0, "gb_per_s": 4000.0}
    report.print_report({"cells": [cell], "ceilings": ceilings, "dtype": "bfloat16", "hardware": {"device": "cuda"}})
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.80  <= 0.92 met" in lines["top-2, E·r <= 256, T >= 4096, against LoRA of rank r"]
    assert "2.50  >= 2.00 met" in lines["lean loop (eager) over auto, E = 8, T = 4096"]
    assert "MISSED" in lines["share of the roofline, 4096x4096, T >= 4096"]


def test_sequences_share_their_experts():
    problem = contenders.make_problem(Shape(16, 24, 32, 4, 8, 2, "sequence"), torch.float32)
    assert problem.top_k_index.shape == (8, 2) and problem.token_index.shape == (32, 2)
    assert torch.equal(problem.token_index[0:4], problem.top_k_index[:1].expand(4, 2))


def test_what_a_backend_is_worth_is_what_its_absence_costs(capsys):
    times = {"peft_r": 1.0, "dense": 2.0, "grouped_mm": 3.0, "segment": 1.0}
    shape = DEFAULT[-1]._replace(num_tokens=1024, top_k=2, num_experts=8, rank=8, in_features=1024, out_features=1024)
    cells = [{"shape": shape._asdict(), "median_ms": times}]
    regret.main_of({"cells": cells, "dtype": "float32", "hardware": {"device": "cpu"}})
    lines = {line.split("  ")[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert lines["dense"] == ["nan", "1.500", "1.500"] and lines["grouped_mm"] == ["nan", "1.000", "1.000"]


def test_a_result_file_is_whole_at_any_moment(tmp_path):
    given = benchmark.argparse.Namespace(results=tmp_path, name="found")
    result_file.write({"a": 1}, given)
    with pytest.raises(TypeError):
        result_file.write({"a": object()}, given)
    assert json.loads((tmp_path / "found.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_the_plot_shows_the_geometric_means_of_the_table():
    result = json.loads((Path(plot.__file__).parent / "results/cpu_fp32_auto.json").read_text())
    figure = plot.plot(result)
    panels = {axis.get_title(): [text.get_text() for text in axis.texts] for axis in figure.axes if axis.get_visible()}
    top_1 = [report.times_of(cell, result) for cell in result["cells"] if report.is_train(cell, 1)]
    ratios = [[row[name] / row["peft_r"] for row in top_1] for name in ("base", "auto", "loop")]
    assert len(panels) == 6
    assert panels[f"T ≥ 1024, top-1 ({len(top_1)} shapes)"] == [f"{report.geomean(found):.2f}" for found in ratios]
