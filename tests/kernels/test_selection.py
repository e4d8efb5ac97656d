"""Which backend runs: the named one or none, and for `auto` the same one every time."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from peft_moe.kernels import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    DispatchPlan,
    backend_report,
    backends,
    explain,
    lora_experts,
)


SHAPE = {"num_tokens": 2048, "in_features": 512, "out_features": 512, "num_experts": 8, "rank": 8, "top_k": 2}


def arguments(dtype: torch.dtype = torch.float32, num_tokens: int = 6) -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(num_tokens, 16, dtype=dtype, requires_grad=True),
        "base_out": torch.randn(num_tokens, 8, dtype=dtype, requires_grad=True),
        "A": torch.randn(3, 4, 16, dtype=dtype, requires_grad=True),
        "B": torch.randn(3, 4, 8, dtype=dtype, requires_grad=True),
        "top_k_weights": torch.rand(num_tokens, 2, requires_grad=True),
        "plan": DispatchPlan.from_index(torch.tensor([[0, 2]] * num_tokens), 3),
    }


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_named_backend_never_falls_back() -> None:
    with pytest.raises(RuntimeError) as raised:
        lora_experts(**arguments(torch.float64), backend="grouped_mm")
    for part in ("grouped_mm", "float64", "backend='grouped_mm'", "eager"):
        assert part in str(raised.value)


def test_named_backend_runs_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "dense")
    assert explain(**SHAPE, backend="gather").backend == "gather"


def test_unknown_backend_suggests_the_one_that_was_meant() -> None:
    with pytest.raises(ValueError, match="no kernel backend 'gathr'. Did you mean 'gather'?") as raised:
        lora_experts(**arguments(), backend="gathr")
    assert all(name in str(raised.value) for name in BACKENDS)


def test_environment_variable_replaces_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "eager")
    choice = explain(**SHAPE)
    assert choice.backend == "eager" and ENVIRONMENT_VARIABLE in choice.because


def test_environment_variable_takes_effect_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_experts(**arguments())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="no kernel backend 'nonsense'"):
        lora_experts(**arguments())


def test_environment_variable_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "grouped_mm")
    with pytest.raises(RuntimeError, match=ENVIRONMENT_VARIABLE):
        lora_experts(**arguments(torch.float64))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 1024, 100_000])
@pytest.mark.parametrize("top_k", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_auto_finds_a_backend_for_everything(num_tokens: int, top_k: int, dtype: torch.dtype, device: str) -> None:
    experts = 8 if top_k else 1
    case = {
        **SHAPE,
        "num_tokens": num_tokens,
        "top_k": top_k,
        "num_experts": experts,
        "dtype": dtype,
        "device": device,
    }
    first, second = explain(**case), explain(**case)
    assert first == second and first.backend in BACKENDS and first.because


def test_auto_on_ordinary_lora_is_plain() -> None:
    assert explain(**{**SHAPE, "num_experts": 1, "top_k": 0}).backend == "plain"


def test_explain_says_backend_reason_and_case_in_one_line() -> None:
    line = str(explain(**SHAPE))
    assert "tokens=2048" in line and "rank=8" in line and "\n" not in line


def test_auto_logs_its_choice_once_per_shape_class(caplog: pytest.LogCaptureFixture) -> None:
    backends.choose.cache_clear()
    backends.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="peft_moe"):
        for num_tokens in (5, 6, 7, 6):
            lora_experts(**arguments(num_tokens=num_tokens))
    assert len(caplog.records) == 1 and "auto ->" in caplog.text


def test_a_named_backend_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    backends.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="peft_moe"):
        lora_experts(**arguments(), backend="dense")
    assert not caplog.records


def test_report_names_every_backend_and_a_reason() -> None:
    report = backend_report()
    assert [name for name, _, _ in report] == sorted(BACKENDS)
    assert all(reason for _, _, reason in report)


@pytest.mark.parametrize("with_plan", [True, False], ids=["dispatched", "plain"])
def test_auto_compiles_whole(with_plan: bool) -> None:
    given = arguments()
    if not with_plan:
        given |= {
            "plan": None,
            "A": given["A"][:1].detach().requires_grad_(),
            "B": given["B"][:1].detach().requires_grad_(),
        }
        given["top_k_weights"] = None
    plan, index = given.pop("plan"), torch.tensor([[0, 2]] * 6)
    names = [name for name, value in given.items() if value is not None]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        fresh = DispatchPlan.from_index(index, 3) if plan is not None else None
        return lora_experts(**dict(zip(names, tensors)), plan=fresh)

    tensors = [given[name] for name in names]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), layer(*tensors)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, grad_out), torch.autograd.grad(expected, tensors, grad_out)
    )


def test_every_backend_that_promises_to_trace_whole_does() -> None:
    given = arguments()
    promising = [name for name, backend in BACKENDS.items() if backend.traces_fullgraph and backend.is_usable()[0]]
    for name in sorted(set(promising) - {"plain"}):
        compiled = torch.compile(lora_experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**given, backend=name), lora_experts(**given, backend=name))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": None}, "no plan, but A holds 3 experts"),
        ({"hidden_states": torch.randn(6, 15)}, "15 wide, but A takes 16"),
        ({"base_out": torch.randn(5, 8)}, r"base_out is \(5, 8\)"),
        ({"hidden_states": torch.randn(6, 16).double()}, r"Cast hidden_states with .to\(A.dtype\)"),
        ({"top_k_weights": torch.rand(6, 1)}, r"top_k_weights is \(6, 1\), but must be \(6, 2\)"),
        ({"A": torch.randn(4, 16)}, r"needs A \(E, R, D\)"),
        ({"B": torch.randn(3, 5, 8)}, "differ in experts or rank"),
        ({"plan": DispatchPlan.from_index(torch.zeros(4, 2, dtype=torch.int64), 3)}, "plan is for 4 tokens"),
    ],
    ids=["no_plan", "width", "base_out", "dtype", "weights", "stacking", "rank", "stale_plan"],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_experts(**{**arguments(), **change})


def test_a_file_in_the_folder_is_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "folder", types.ModuleType("folder"))
    sys.modules["folder"].__path__ = [str(tmp_path)]
    source = "from peft_moe.kernels import Backend\nBACKEND = Backend(name={!r}, summary='', run=None)\n"
    (tmp_path / "mine.py").write_text(source.format("mine"))
    assert list(backends.discover("folder", [str(tmp_path)])) == ["mine"]
    (tmp_path / "other.py").write_text(source.format("misnamed"))
    with pytest.raises(ImportError, match="must define BACKEND = Backend.name='other'"):
        backends.discover("folder", [str(tmp_path)])
