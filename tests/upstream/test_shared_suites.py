"""transformers' own shared tests over MoeLlava, LLaVA as the control: MoeLlava fails nothing that LLaVA passes."""

from __future__ import annotations

import pytest
import transformers

from upstream import cases, expectations
from upstream.cases import MODELS


pytestmark = pytest.mark.slow

SEVERAL_PROCESSES = {"tensor_parallel", "expert_parallel", "fsdp"}
IS_LISTED_VERSION = transformers.__version__.startswith(f"{expectations.LISTED_FOR}.")


def parameters() -> list:
    """Every test of every suite; one that is skipped for each suite that cannot be had."""
    found = []
    for suite in cases.BASES:
        try:
            marks = [pytest.mark.exhaustive] if suite in SEVERAL_PROCESSES else []
            found += [pytest.param(suite, name, marks=marks, id=f"{suite}-{name}") for name in cases.tests_of(suite)]
        except (RuntimeError, ImportError, AttributeError) as error:
            reason = pytest.mark.skip(reason=f"{suite}: {error}")
            found.append(pytest.param(suite, "", marks=reason, id=suite))
    return found


@pytest.mark.parametrize(("suite", "name"), parameters())
def test_moe_llava_fails_nothing_that_llava_passes(suite, name):
    outcomes = {model: cases.run(suite, model, name) for model in MODELS}
    statuses = [outcomes[model].status for model in MODELS]
    problem = expectations.problem_with(suite, name, *statuses, is_listed_version=IS_LISTED_VERSION)
    if problem:
        details = "\n\n".join(f"{model} {outcome.status}: {outcome.detail}" for model, outcome in outcomes.items())
        pytest.fail(f"{problem}\n\n{details}", pytrace=False)
    if outcomes["moe_llava"].status == "failed":
        pytest.xfail(expectations.BOTH_FAIL.get(suite, {}).get(name, "Native LLaVA fails it too."))
    if outcomes["moe_llava"].status == "skipped":
        pytest.skip(outcomes["moe_llava"].detail)


def test_lists_name_tests_that_exist():
    for listed in (expectations.BOTH_FAIL, expectations.MOE_LLAVA_SKIPS):
        for suite, tests in listed.items():
            try:
                names = cases.tests_of(suite)
            except (RuntimeError, ImportError, AttributeError) as error:
                pytest.skip(f"{suite}: {error}")
            if IS_LISTED_VERSION:
                assert set(tests) <= set(names)
            assert all(tests.values())


@pytest.mark.parametrize(
    ("test", "llava", "moe_llava", "problem"),
    [
        ("test_new", "passed", "passed", None),
        ("test_new", "skipped", "passed", None),
        ("test_new", "failed", "passed", None),
        ("test_new", "skipped", "skipped", None),
        ("test_new", "passed", "failed", "MoeLlava fails"),
        ("test_new", "skipped", "failed", "MoeLlava fails"),
        ("test_new", "failed", "failed", "BOTH_FAIL in expectations.py does not say why"),
        ("test_new", "passed", "skipped", "MOE_LLAVA_SKIPS in expectations.py does not say why"),
        ("test_listed", "failed", "failed", None),
        ("test_listed", "failed", "passed", "Take it off the list"),
        ("test_listed", "passed", "failed", "MoeLlava fails"),
        ("test_skipped", "passed", "skipped", None),
        ("test_skipped", "passed", "passed", "Take it off the list"),
        ("test_skipped", "passed", "failed", "MoeLlava fails"),
    ],
)
def test_rule(monkeypatch, test, llava, moe_llava, problem):
    monkeypatch.setattr(expectations, "BOTH_FAIL", {"modeling": {"test_listed": "a reason"}})
    monkeypatch.setattr(expectations, "MOE_LLAVA_SKIPS", {"modeling": {"test_skipped": "a reason"}})
    found = expectations.problem_with("modeling", test, llava, moe_llava)
    assert (found is None) == (problem is None) and (problem or "") in (found or "")


def test_failures_errors_and_skips_are_told_apart():
    class Case(cases._Case):
        model = "llava"

        def test_fails(self):
            assert False, "because"

        def test_raises(self):
            raise ValueError("because")

        def test_skips(self):
            self.skipTest("because")

        def test_skips_as_pytest_does(self):
            pytest.skip("because")

        def test_fails_in_part(self):
            for number in range(2):
                with self.subTest(number=number):
                    assert number == 0, "because"

    for name, status in (
        ("test_fails", "failed"),
        ("test_raises", "failed"),
        ("test_skips", "skipped"),
        ("test_skips_as_pytest_does", "skipped"),
        ("test_fails_in_part", "failed"),
    ):
        outcome = cases.outcome_of(Case(name))
        assert outcome.status == status and "because" in outcome.detail
