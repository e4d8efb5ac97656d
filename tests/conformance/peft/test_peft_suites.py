"""PEFT's own tests over our tuners, with LoRA as the control: what LoRA passes, ours pass."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

import pytest
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from conformance.peft import cases, expectations, left_out
from conformance.peft.report import LEFT_OUT_PROPERTY, Result, failures_of_ours_alone, table
from conformance.peft.selection import Selection
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
    assert Selection.is_short_run or suites == {suite.name for suite in SUITES}


@pytest.mark.skipif(not expectations.IS_LISTED_VERSION, reason="the lists are for another version of PEFT")
def test_every_test_that_is_left_out_has_a_reason_and_every_reason_a_test(record_property):
    found = {f"{suite.name}.{test}": reason for suite in SUITES for test, reason in suite.left_out()}
    assert not [test for test, reason in found.items() if reason is None]
    for patterns in left_out.LEFT_OUT.values():
        for pattern in patterns.split():
            assert any(fnmatchcase(test, pattern) for test in found), pattern
    record_property(LEFT_OUT_PROPERTY, list(found.values()))


def test_new_experts_take_part_in_every_suite_or_there_is_a_reason():
    if Selection.is_short_run:
        pytest.skip("a short run does not name all tests")
    new_experts = {case.name for case in cases.NEW_EXPERTS} - {"lora"}
    found = {suite for suite, _, case in collected() if case in new_experts}
    assert {suite.name for suite in SUITES} - found == set(left_out.WITHOUT_NEW_EXPERTS)


@pytest.mark.skipif(not expectations.IS_LISTED_VERSION, reason="the lists are for another version of PEFT")
def test_no_suite_loses_tests():
    if Selection.is_short_run:
        pytest.skip("a short run does not name all tests")
    tests = {(suite, test) for suite, test, _ in collected()}
    assert Counter(suite for suite, _ in tests) == expectations.NUM_TESTS


@pytest.mark.skipif(not expectations.IS_LISTED_VERSION, reason="the lists are for another version of PEFT")
@pytest.mark.parametrize("listed", [*expectations.FAILS, *expectations.SKIPS], ids=lambda listed: listed.tests[:40])
def test_lists_name_tests_that_exist(listed):
    if Selection.is_short_run:
        pytest.skip("a short run does not name all tests")
    found = collected()
    for pattern in listed.tests.split():
        one = expectations.Listed(listed.reason, pattern, listed.cases, listed.suites)
        assert any(one.covers(*names, "") for names in found), pattern


def test_patterns_of_a_list_all_have_to_match():
    listed = expectations.Listed("because", "test_merge_* test_safe", "mole-* mocle", suites="custom", ids="*-False-*")
    assert listed.covers("custom", "test_safe", "mocle", "a-False-b")
    assert not listed.covers("decoder", "test_safe", "mocle", "a-False-b")
    assert not listed.covers("custom", "test_other", "mocle", "a-False-b")
    assert not listed.covers("custom", "test_merge_it", "mocle-other", "a-False-b")
    assert not listed.covers("custom", "test_merge_it", "mole-other", "a-True-b")


@pytest.mark.parametrize(
    ("outcome", "is_listed", "is_control", "problem"),
    [
        ("passed", False, False, None),
        ("passed", True, False, "Take it off the list"),
        ("skipped", False, False, "SKIPS in expectations.py does not say why"),
        ("skipped", False, True, None),
        ("skipped", True, False, None),
        ("failed", False, False, None),
    ],
)
def test_rule_about_skips(outcome, is_listed, is_control, problem):
    skip = expectations.Listed("because", "*", "*") if is_listed else None
    found = expectations.problem_with(outcome, skip, is_control=is_control)
    assert (found is None) == (problem is None) and (problem or "") in (found or "")


def test_table_sets_every_configuration_beside_the_control_on_the_same_tests():
    results = [
        Result("decoder", "test_a", "lora", "passed"),
        Result("decoder", "test_b", "lora", "failed"),
        Result("decoder", "test_c", "lora", "skipped"),
        Result("decoder", "test_a", "mole", "failed"),
        Result("decoder", "test_b", "mole", "failed"),
        Result("decoder", "test_a", "mocle", "xfailed", "It cannot."),
        Result("decoder", "test_b", "mocle", "xfailed", "It need not."),
    ]
    assert table(results) == [
        "suite    configuration  passed / failed / skipped / xfailed  LoRA on the same",
        "decoder  mole           0 / 2 / 0 / 0                        1 / 1 / 0 / 0",
        "decoder  mocle          0 / 0 / 0 / 2                        1 / 1 / 0 / 0",
        "all                     0 / 2 / 0 / 2                        2 / 2 / 0 / 0",
    ]
    assert failures_of_ours_alone(results) == [
        "Failures that the control lacks: 1",
        "  decoder: test_a with mole",
        "Expected failures that the control lacks: 1",
        "     1  It cannot.",
    ]
