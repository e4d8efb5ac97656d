"""PEFT's own tests over our tuners, with LoRA as the control: what LoRA passes, ours pass."""

from __future__ import annotations

from collections import Counter

import pytest
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from conformance.peft import cases, expectations
from conformance.peft.suites import SUITES


pytestmark = pytest.mark.slow

CLASSES: dict[str, type] = {}
for _suite in SUITES:
    try:
        CLASSES.update({kind.__name__: kind for kind in _suite.classes()})
    except (RuntimeError, ImportError) as error:
        if isinstance(error, ImportError) and expectations.IS_LISTED_VERSION:
            raise
        pytest.skip(f"{_suite.name}: {error}", allow_module_level=True)
globals().update(CLASSES)


def collected() -> list[tuple[str, str, str]]:
    """Suite, test and configuration of all tests."""
    marks = [
        mark
        for kind in CLASSES.values()
        for test in vars(kind).values()
        for parametrize in getattr(test, "pytestmark", [])
        if parametrize.name == "parametrize"
        for parameters in parametrize.args[1]
        for mark in getattr(parameters, "marks", [])
        if mark.name == "peft_tests"
    ]
    return [(suite, test, row.case.name) for suite, test, row in (mark.args for mark in marks)]


def test_every_registered_tuner_of_ours_takes_part():
    configs = PEFT_TYPE_TO_CONFIG_MAPPING.values()
    ours = {config for config in configs if config.__module__.partition(".")[0] == "peft_moe"}
    assert ours == {case.config_cls for case in (*cases.ADAPTERS_OF_LINEARS, *cases.NEW_EXPERTS)} - {LoraConfig}


def test_every_suite_has_tests_of_ours_and_of_the_control():
    found = {(suite, case == "lora") for suite, _, case in collected()}
    suites = {suite for suite, _ in found}
    assert found == {(suite, is_control) for suite in suites for is_control in (True, False)}
    assert cases.Selection.is_short_run or suites == {suite.name for suite in SUITES}


@pytest.mark.skipif(not expectations.IS_LISTED_VERSION, reason="the lists are for another version of PEFT")
def test_no_suite_loses_tests():
    if cases.Selection.is_short_run:
        pytest.skip("a short run does not name all tests")
    tests = {(suite, test) for suite, test, _ in collected()}
    assert Counter(suite for suite, _ in tests) == expectations.NUM_TESTS


@pytest.mark.skipif(not expectations.IS_LISTED_VERSION, reason="the lists are for another version of PEFT")
@pytest.mark.parametrize("listed", [*expectations.FAILS, *expectations.SKIPS], ids=lambda listed: listed.tests[:40])
def test_lists_name_tests_that_exist(listed):
    if cases.Selection.is_short_run:
        pytest.skip("a short run does not name all tests")
    found = collected()
    for pattern in listed.tests.split():
        one = expectations.Listed(listed.reason, pattern, listed.cases, listed.suites)
        assert any(one.covers(*names, "") for names in found), pattern
