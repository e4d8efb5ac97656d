"""Keeps PEFT's tests out of runs that leave out slow tests, and prints what they gave at the end of the others."""

from __future__ import annotations

import re

import pytest

from conformance.peft import cases, expectations
from conformance.peft.report import CONTROL, PROPERTY, Result, failures_of_ours_alone, table
from upstream.fetch import sdist_tests


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Merely naming the tests takes as long as many a fast test."""
    return True if "not slow" in config.getoption("markexpr") else None


def pytest_configure(config) -> None:
    """Makes the markers of the tests known, which have no effect here."""
    config.addinivalue_line("markers", "peft_tests(suite, test, row): one of PEFT's own tests with a configuration")
    cases.Selection.is_short_run = "not exhaustive" in config.getoption("markexpr")
    try:
        sources = (sdist_tests("peft") / "tests").glob("test*.py")
    except RuntimeError:
        return
    names = {name for source in sources for name in re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8"))}
    for name in sorted(names):
        config.addinivalue_line("markers", f"{name}: of PEFT's tests")


def pytest_itemcollected(item) -> None:
    """Marks what is expected to fail, and leaves a note for the table, which the process that prints it can read."""
    mark = item.get_closest_marker("peft_tests")
    if mark is None:
        return
    suite, test, row = mark.args
    key = item.nodeid.rpartition("::")[2].replace(f":{row.case.name}", "")
    item.user_properties.append((PROPERTY, (suite, key, row.case.name)))
    failure = expectations.listed_in(expectations.FAILS, suite, test, row.case.name, item.callspec.id)
    if failure is not None:
        is_strict = expectations.IS_LISTED_VERSION
        item.add_marker(pytest.mark.xfail(reason=failure.reason, raises=failure.raises, strict=is_strict))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A skip of ours has to be listed, and what is listed has to be skipped."""
    report = yield
    mark = item.get_closest_marker("peft_tests")
    if mark is None or not expectations.IS_LISTED_VERSION or hasattr(report, "wasxfail"):
        return report
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return report
    suite, test, row = mark.args
    skip = expectations.listed_in(expectations.SKIPS, suite, test, row.case.name, item.callspec.id)
    problem = expectations.problem_with(report.outcome, skip, is_control=row.case.name == CONTROL)
    if problem:
        report.longrepr = f"{problem} {report.longrepr[2] if report.skipped else ''}"
        report.outcome = "failed"
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """Counts the outcomes, in whichever process the tests ran."""
    results = []
    for status, reports in terminalreporter.stats.items():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == PROPERTY and status in ("passed", "failed", "error", "skipped", "xfailed"):
                    status_of_test = "failed" if status == "error" else status
                    results.append(Result(*value, status_of_test, getattr(report, "wasxfail", "")))
    write = terminalreporter.write_line
    if results:
        terminalreporter.section(f"PEFT's own tests, with {CONTROL} as the control")
        for line in (*table(results), *failures_of_ours_alone(results)):
            write(line)
