"""The benchmarks of whole models and of FFN experts run from end to end, on the CPU and on a stand-in for CUDA."""

from __future__ import annotations

import json
import sys

import cuda_stand_in
import ffn_experts
import pytest
import timing
import whole_model


pytestmark = pytest.mark.slow


@pytest.fixture(params=["cpu", "cuda's stand-in"])
def clock(request, monkeypatch):
    """The clock of the benchmarks; both count on the same tensors."""
    if request.param == "cpu":
        return timing.CpuClock()
    cuda_stand_in.install(monkeypatch)
    found = timing.CudaClock(device="cpu")
    for module in (ffn_experts, whole_model):
        monkeypatch.setattr(module, "clock_of", lambda device: found)
    return found


def run(monkeypatch, tmp_path, module, *arguments: str) -> dict:
    """A command, in this process, and what it wrote."""
    given = ["--quick", "--rounds", "1", "--name", "found", "--results", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{module.__name__}.py", *given])
    module.main()
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.parametrize("method", whole_model.METHODS)
def test_whole_models(method, clock, monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, tmp_path, whole_model, "--method", method, "--optimizer", "--cells", "step", "decode")
    for what in ("step", "decode"):
        assert set(result["cells"][what]) == set(whole_model.METHODS[method])
        assert all(seconds > 0 for values in result["cells"][what].values() for seconds in values)
    assert set(result["tokens_per_s"]) == set(whole_model.METHODS[method])
    assert "tok/s" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_memory_of_whole_models(monkeypatch, tmp_path):
    monkeypatch.setattr(whole_model, "METHODS", {"mole": {"lora": whole_model.METHODS["mole"]["lora"]}})
    (mib,) = run(monkeypatch, tmp_path, whole_model, "--cells", "memory")["cells"]["memory"]["lora"]
    assert mib > 0


def test_parts_for_which_there_is_no_time_are_named(monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, tmp_path, whole_model, "--cells", "step", "decode", "--total_seconds", "-1")
    assert result["not_reached"] == ["step", "decode"] and result["cells"] == {}
    assert "not reached: decode" in capsys.readouterr().out


def test_ffn_experts(clock, monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, tmp_path, ffn_experts)
    assert {"dense", "eager", "modules", "grouped_mm", "peft_moe"} <= set(result["cells"][0]["median_ms"])
    assert all(error < 1e-4 for cell in result["cells"] for error in cell["errors"].values())
    assert "peft_moe_triton" in result["unusable"], "there is no device that Triton runs on"
    whole = result["whole_model"]
    assert {"dense", "eager", "grouped_mm", "peft_moe"} <= set(whole["step"]) & set(whole["tokens_per_s"])
    printed = capsys.readouterr().out
    assert "MoeLlava, peak_mib" in printed and "grouped_mm over peft_moe, all 2 shapes" in printed
