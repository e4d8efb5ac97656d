"""The file of measurements behind `auto`: off by default, asked before the rule, filled once, and never at a bad moment."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peft_moe.kernels import ENVIRONMENT_VARIABLE, Case, DispatchPlan, explain, lora_experts, measured, selection


SHAPE = {"num_tokens": 6, "in_features": 16, "out_features": 8, "num_experts": 3, "rank": 4, "top_k": 2}


def call(**changed: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(6, 16, generator=generator),
        "base_out": torch.randn(6, 8, generator=generator),
        "A": torch.randn(3, 4, 16, generator=generator).requires_grad_(),
        "B": torch.randn(3, 4, 8, generator=generator).requires_grad_(),
        "top_k_weights": torch.rand(6, 2, generator=generator),
        "plan": DispatchPlan.from_index(torch.tensor([[0, 2]] * 6), 3),
    }
    return lora_experts(**{**given, **changed})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that does not exist yet, named by the environment."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    path = tmp_path / "folder" / "kernels.json"
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(path))
    return path


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were measured; `dense`, which the rule would not take here, always wins."""
    seen: list[str] = []

    def measure(case, names, device, trains):
        seen.append(case.describe())
        return {**dict.fromkeys(names, 2.0), "dense": 1.0}

    monkeypatch.setattr(measured, "measure", measure)
    return seen


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement would fail the test."""
    monkeypatch.setattr(measured, "measure", lambda *_: pytest.fail("measured at a bad moment"))


def entries(file: Path) -> dict:
    return json.loads(file.read_text())["entries"]


def another_process_prefers_segment(content: str) -> str:
    """The file with another winner everywhere."""
    written = json.loads(content)
    written["entries"] = dict.fromkeys(written["entries"], {"backend": "segment", "ms": {"segment": 1.0}})
    return json.dumps(written)


def test_nothing_is_measured_unless_a_file_is_named(monkeypatch, measurements):
    monkeypatch.delenv(measured.CACHE_VARIABLE, raising=False)
    call()
    assert not measurements


def test_the_winner_of_a_measurement_runs_and_is_explained(file, measurements):
    assert "measured" not in explain(**SHAPE).because
    call()
    choice = explain(**SHAPE)
    assert choice.backend == "dense" and "measured here (dense 1 ms, " in choice.because
    assert [entry["backend"] for entry in entries(file).values()] == ["dense"]


def test_a_shape_class_is_measured_once(file, measurements):
    for num_tokens in (5, 6, 8):
        call(
            hidden_states=torch.randn(num_tokens, 16),
            base_out=torch.randn(num_tokens, 8),
            top_k_weights=torch.rand(num_tokens, 2),
            plan=DispatchPlan.from_index(torch.tensor([[0, 2]] * num_tokens), 3),
        )
    assert len(measurements) == 1


def test_the_next_process_reads_the_file(file, measurements):
    call()
    measured._tables.clear()
    call()
    assert len(measurements) == 1


def test_what_another_process_wrote_meanwhile_is_kept(file, measurements):
    call()
    written = json.loads(file.read_text())
    written["entries"]["from another process"] = {"backend": "segment", "ms": {"segment": 1.0}}
    file.write_text(json.dumps(written))
    with torch.no_grad():
        call()
    assert len(entries(file)) == 3 and "from another process" in entries(file)
    assert list(file.parent.iterdir()) == [file]


def test_a_recomputation_takes_the_backend_of_its_forward_whatever_others_write(file, measurements):
    x = torch.ones(6, 16, requires_grad=True)
    out = checkpoint(lambda x: call(hidden_states=x), x, use_reentrant=False)
    file.write_text(another_process_prefers_segment(file.read_text()))
    with torch.no_grad():
        call()  # reads what the other process wrote, and adds to it
    assert [entry["backend"] for entry in entries(file).values()] == ["dense", "segment"]
    assert explain(**SHAPE).backend == "dense"
    out.sum().backward()


def test_what_another_process_measured_first_counts_for_both(file, measurements, monkeypatch):
    call()
    theirs = another_process_prefers_segment(file.read_text())
    file.unlink()
    measured._tables.clear()

    def measure(*_):
        file.write_text(theirs)
        return {"dense": 1.0}

    monkeypatch.setattr(measured, "measure", measure)
    call()
    assert explain(**SHAPE).backend == "segment"
    assert file.read_text() == theirs


def test_training_and_inference_are_measured_apart(file, measurements):
    call()
    with torch.no_grad():
        assert "measured" not in explain(**SHAPE).because
        call()
    assert len(measurements) == 2


def test_another_version_of_torch_measures_anew(file, measurements, monkeypatch):
    call()
    monkeypatch.setattr(torch, "__version__", "99.0")
    call()
    assert len(measurements) == 2


@pytest.mark.parametrize("how", ["named", "environment"])
def test_a_name_beats_the_file(file, nothing_measured, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "segment")
    call(backend="segment" if how == "named" else "auto")
    assert explain(**SHAPE, backend="segment" if how == "named" else "auto").backend == "segment"


def test_a_real_measurement_finds_the_fastest_and_disturbs_nothing(file, monkeypatch):
    monkeypatch.setattr(measured, "HOPELESS", float("inf"))
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    assert torch.equal(torch.get_rng_state(), state)
    (entry,) = entries(file).values()
    assert entry["ms"][entry["backend"]] == min(entry["ms"].values())
    assert {*entry["ms"], "eager"} == set(selection.runnable(Case(**SHAPE, dtype=torch.float32, device="cpu")))
    torch.testing.assert_close(found, call(backend="eager"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_measuring_inside_a_checkpoint_leaves_its_gradients_alone(file, use_reentrant):
    x, again = (torch.ones(6, 16, requires_grad=True) for _ in range(2))
    checkpoint(lambda x: call(hidden_states=x), x, use_reentrant=use_reentrant).sum().backward()
    call(hidden_states=again, backend="eager").sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert entries(file)


def test_whole_examples_and_every_dtype_can_be_measured(file):
    plan = DispatchPlan.from_index(torch.tensor([[0, 2]] * 2), 3, tokens_per_example=3)
    call(plan=plan, top_k_weights=torch.rand(2, 2))
    for dtype in (torch.float64, torch.bfloat16):
        names = ("hidden_states", "base_out", "A", "B")
        shapes = ((6, 16), (6, 8), (3, 4, 16), (3, 4, 8))
        call(**{name: torch.randn(shape, dtype=dtype) for name, shape in zip(names, shapes)})
    assert len(entries(file)) == 3


def test_nothing_is_measured_under_a_compiler(file, nothing_measured):
    plan, tensors = DispatchPlan.from_index(torch.tensor([[0, 2]] * 6), 3), (torch.ones(6, 16), torch.ones(6, 8))
    factors = torch.ones(3, 4, 16), torch.ones(3, 4, 8)
    torch.compile(lora_experts, backend="aot_eager", fullgraph=True)(*tensors, *factors, plan=plan)
    assert not file.exists()


def test_nothing_is_measured_with_fake_tensors():
    case = Case(**SHAPE, dtype=torch.float32, device="cpu")
    assert measured.can_measure(case)
    with FakeTensorMode():
        assert not measured.can_measure(case)


def test_nothing_is_measured_in_a_backward_pass(file, nothing_measured):
    class CallsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            call()
            return grad

    CallsInBackward.apply(torch.ones(1, requires_grad=True)).backward()
    assert not file.exists()


def test_threads_measure_once(file, monkeypatch):
    seen, together = [], threading.Barrier(4)

    def measure(*_):
        seen.append(threading.current_thread().name)
        return {"dense": 1.0}

    monkeypatch.setattr(measured, "measure", measure)
    run: Callable[[], object] = lambda: (together.wait(10), call())  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == ["peft_moe-measures-kernels"]


def test_what_is_hopelessly_slow_is_called_twice_only(monkeypatch):
    counts: dict[str, int] = {}

    def seconds_of(run, device):
        name = next(name for name, backend in measured.BACKENDS.items() if run.args[0] is backend)
        counts[name] = counts.get(name, 1) + 1
        return 100.0 if name == "segment" else 1.0

    monkeypatch.setattr(measured, "seconds_of", seconds_of)
    case = Case(**SHAPE, dtype=torch.float32, device="cpu")
    assert measured.measure(case, ["dense", "segment"], torch.device("cpu"), True) == {"dense": 1000.0}
    assert counts == {"dense": 2 + measured.ROUNDS, "segment": 2}


def test_a_backend_that_fails_is_left_out(file, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    broken = selection.BACKENDS["segment"].__class__(name="segment", summary="", run=fail)
    monkeypatch.setitem(selection.BACKENDS, "segment", broken)
    call()
    (entry,) = entries(file).values()
    assert "segment" not in entry["ms"]


def test_the_rule_decides_where_nothing_could_be_measured(file, monkeypatch):
    attempts = []
    monkeypatch.setattr(measured, "measure", lambda *_: attempts.append(1) or {})
    call(), call()
    assert len(attempts) == 1 and not file.exists()
    assert "measured" not in explain(**SHAPE).because


def test_a_measurement_runs_on_the_current_device(monkeypatch):
    entered = []

    @contextmanager
    def device(chosen):
        entered.append(chosen)
        yield
        entered.remove(chosen)

    def measure(case, names, device, trains):
        return {"dense": 1.0} if entered == [device] else {}

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(measured, "measure", measure)
    found = measured._in_clean_thread(Case(**SHAPE, dtype=torch.float32, device="cuda"), ["dense"])
    assert found.backend == "dense"


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file"])
def test_a_file_that_cannot_be_used_is_warned_of_once(file, measurements, caplog, obstacle):
    if obstacle == "a file for a folder":
        file.parent.touch()
    else:
        file.mkdir(parents=True)
    for _ in range(2):
        call()
        with torch.no_grad():
            call()
    assert len(measurements) == 2
    assert explain(**SHAPE).backend == "dense"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{measured.CACHE_VARIABLE} names {str(file)!r}, which cannot be read or written: " in warning
    assert {*file.parent.parent.rglob("*")} <= {file, file.parent}


def test_the_file_has_the_permissions_of_any_new_file(file, measurements):
    call()
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


ENTRY = '{"format": "' + measured.FORMAT + '", "entries": {"a key": %s}}'


@pytest.mark.parametrize(
    "content",
    [
        *('{"a": 1}', "no json", '{"format": "other", "entries": {}}', "[]"),
        ENTRY % '{"backend": "dense", "ms": {"dense": "fast"}}',
        ENTRY % '{"backend": "dense", "ms": [1.0]}',
        ENTRY % '{"backend": null, "ms": {}}',
    ],
)
def test_another_file_is_refused_and_kept(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{measured.CACHE_VARIABLE} names .* no cache of kernel measurements"):
        call()
    assert file.read_text() == content
