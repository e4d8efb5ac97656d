"""`docs/reference/errors.md`: what the package says when something is wrong, in the words that the tests see.

A test is heard where it expects an error (`pytest.raises`), looks at the log (`caplog`) or starts a process that tells
(`told.tell`). Those of `make test` are heard, and no others: no tests with random input, which say other words each time.

`pytest --error-table=write` writes the page. A run of part of the tests replaces the rows of its own tests and keeps the
others; so does a whole run with those of tests that failed or were skipped. With `--error-table=check` a test fails whose
message is not on the page, and a whole run lists the rows that nobody says any more. Messages that differ in numbers alone
are one row: sizes of files and the like are not the same everywhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path

import pytest

import told


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/errors.md"
PROPERTY = "said by peft_moe"
HEAD = """# Errors

What the package says when something is wrong, by the module that says it: errors, and warnings in the log. This page is
written by `make errors` from the messages that the tests of `make test` see, and `make test` compares each of them again;
`…` stands for a folder.
"""
TABLE = "| case | kind | message |\n|---|---|---|"
MODULE = re.compile(r"^## `(.+)`$")
ROW = re.compile(r"^\| (.+?) \| `(\w+)` \| (.+) \|$")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")

# (module, kind, message without its numbers) → case, message
Rows = dict[tuple[str, str, str], tuple[str, str]]


def pytest_addoption(parser):
    parser.addoption("--error-table", choices=("off", "check", "write"), default="off", help=__doc__.splitlines()[0])


def pytest_configure(config):
    if config.getoption("--error-table") != "off":
        config.pluginmanager.register(ErrorTable(config), "error_table")


class ErrorTable:
    """What it hears travels with the reports of the tests, from other processes too."""

    def __init__(self, config):
        self.mode = config.getoption("--error-table")
        self.page = read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        self.item = None
        self.heard: Rows = {}
        self.cases = {"passed": set(), "unsettled": set()}
        self.stale: Rows = {}
        close = pytest.RaisesExc.__exit__

        def close_and_tell(context, kind, error, traceback):
            is_expected = close(context, kind, error, traceback)
            if is_expected:
                self.hear(told.module_that_raised(error), type(error).__name__, str(error))
            return is_expected

        pytest.RaisesExc.__exit__ = close_and_tell
        logging.getLogger("peft_moe").addHandler(_Listener(self))
        descriptor, self.told = tempfile.mkstemp(prefix="peft-moe-told-")
        os.close(descriptor)
        os.environ[told.VARIABLE] = self.told

    def hear(self, module, kind, message):
        """Keep a message with the test that is running."""
        item = self.item
        is_random = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if module is None or item is None or is_random or any(map(item.get_closest_marker, ("exhaustive", "gpu"))):
            return
        said = PROPERTY, (module, kind, as_cell(message))
        if said not in item.user_properties:
            item.user_properties.append(said)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Fixtures start processes, too."""
        self.item = item
        try:
            return (yield)
        finally:
            self.item = None
            os.truncate(self.told, 0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        result = yield
        for line in Path(self.told).read_text(encoding="utf-8").splitlines():
            self.hear(*json.loads(line))
        if self.mode == "check":
            said = [value for name, value in item.user_properties if name == PROPERTY and row(*value) not in self.page]
            unknown = [f"{kind} of {module} that says {message!r}" for module, kind, message in said]
            if unknown:
                pytest.fail(
                    f"{PAGE.relative_to(ROOT)} has no {', and no '.join(unknown)}. If that is what users should read, run "
                    f"'make errors PYTEST_ARGS=\"-k {getattr(item, 'originalname', item.name)}\"' and look at the "
                    "difference.",
                    pytrace=False,
                )
        return result

    def pytest_runtest_logreport(self, report):
        case = in_words(report.nodeid)
        if report.when != "call" or not report.passed:
            if not report.passed:
                self.cases["unsettled"].add(case)
            return
        self.cases["passed"].add(case)
        for name, value in report.user_properties:
            if name == PROPERTY:
                add(self.heard, row(*value), (case, value[2]))

    def pytest_sessionfinish(self, session):
        os.unlink(self.told)
        if hasattr(session.config, "workerinput"):
            return
        is_whole = _is_whole(session)
        kept = remaining(self.page, self.cases["passed"], self.cases["unsettled"], is_whole=is_whole)
        if self.mode == "check" and is_whole:
            self.stale = {key: said for key, said in self.page.items() if key not in {**kept, **self.heard}}
        elif self.mode == "write" and self.cases["passed"]:
            for key, said in kept.items():
                add(self.heard, key, said)
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(as_page(self.heard), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter):
        if self.stale:
            terminalreporter.section(
                f"{PAGE.relative_to(ROOT)}: no test sees these any more; 'make errors' removes them"
            )
            for (module, kind, _), (case, message) in sorted(self.stale.items()):
                terminalreporter.write_line(f"{module}, {case}: {kind}: {message[:120]}")


class _Listener(logging.Handler):
    """Hears the warnings of the package in tests that look at the log."""

    def __init__(self, table):
        super().__init__(logging.WARNING)
        self.table = table

    def emit(self, record):
        if "caplog" in getattr(self.table.item, "fixturenames", ()):
            self.table.hear(told.module_in(record.pathname), "warning", record.getMessage())


def _is_whole(session):
    """Whether all tests of `make test` were asked for, and the run came to its end."""
    config = session.config
    is_part = config.args != ["tests"] or "slow" in config.getoption("markexpr")
    is_part = is_part or any(config.getoption(name, None) for name in ("keyword", "lf", "deselect", "ignore"))
    return not (is_part or session.shouldfail or session.shouldstop)


def remaining(page: Rows, passed: set[str], unsettled: set[str], *, is_whole: bool) -> Rows:
    """The rows of the page whose tests were not asked: they did not run to their end."""
    if is_whole:
        return {key: said for key, said in page.items() if said[0] in unsettled}
    return {key: said for key, said in page.items() if said[0] not in passed - unsettled}


def row(module: str, kind: str, message: str) -> tuple[str, str, str]:
    """What tells a row from others."""
    return module, kind, NUMBER.sub("0", message)


def add(rows: Rows, key: tuple[str, str, str], said: tuple[str, str]) -> None:
    """Of several cases that say the same, the first in the alphabet stands on the page."""
    rows[key] = min(said, rows.get(key, said))


def as_cell(message: str) -> str:
    """One line of a table, without what differs from run to run."""
    message = re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "…/", message)
    # folders that pytest numbers, by how many of that name there were before
    message = re.sub(r"…/(test_\w+?|encoder)\d+\b", r"…/\1", message)
    message = re.sub(r"0x[0-9a-f]{6,}", "0x…", message).replace("<", "&lt;").replace("*", "\\*")
    return "<br>".join(" ".join(line.split()) for line in message.strip().splitlines()).replace("|", "\\|")


def in_words(nodeid: str) -> str:
    """The case that a test is about."""
    test, _, parameters = nodeid.partition("[")
    words = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    parameters = parameters.removesuffix("]").replace("|", "\\|")
    return f"{words}: {parameters}" if parameters else words


def as_page(rows: Rows) -> str:
    """The text of the page."""
    parts = [HEAD, f"{len(rows)} messages.\n"]
    for module in sorted({module for module, _, _ in rows}):
        lines = sorted((case, kind, message) for (name, kind, _), (case, message) in rows.items() if name == module)
        parts.append(f"## `{module}`\n\n{TABLE}")
        parts.append("\n".join(f"| {case} | `{kind}` | {message} |" for case, kind, message in lines) + "\n")
    return "\n".join(parts)


def read(page: str) -> Rows:
    """The rows of the text of the page."""
    module, rows = "", {}
    for line in page.splitlines():
        if heading := MODULE.match(line):
            module = heading[1]
        elif found := ROW.match(line):
            case, kind, message = found.groups()
            add(rows, row(module, kind, message), (case, message))
    return rows
