"""`docs/reference/errors.md`: the errors of the package that the fast tests provoke, with the messages that they saw.

`pytest --error-table=write` writes the page from the tests of that run, if all passed; with `--error-table=check` a test
fails whose message is not on the page. `make errors` and `make test` do so. What nobody says any more goes when it is written
the next time.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/errors.md"
SOURCES = ROOT / "src"
PROPERTY = "error of peft_moe"
HEAD = """# Errors

What the package says when something is wrong, by the module that says it. This page is written by `make errors` from the
messages that the tests saw, and `make test` compares each of them again; `…` stands for a folder.
"""
TABLE = "| case | error | message |\n|---|---|---|"
ROW = re.compile(r"^\| .+? \| `(\w+)` \| (.+) \|$", re.MULTILINE)

_running: list[pytest.Item] = []


def pytest_addoption(parser):
    parser.addoption("--error-table", choices=("off", "check", "write"), default="off", help=__doc__.splitlines()[0])


def pytest_configure(config):
    if config.getoption("--error-table") != "off":
        config.pluginmanager.register(ErrorTable(config.getoption("--error-table")), "error_table")


class ErrorTable:
    """Listens to `pytest.raises`; what it hears travels with the reports of the tests, from other processes too."""

    def __init__(self, mode):
        self.mode = mode
        self.cases = {}
        self.known = set(ROW.findall(PAGE.read_text())) if mode == "check" else set()
        close = pytest.RaisesExc.__exit__

        def close_and_tell(context, kind, error, traceback):
            is_expected = close(context, kind, error, traceback)
            if is_expected:
                self.hear(error)
            return is_expected

        pytest.RaisesExc.__exit__ = close_and_tell

    def hear(self, error):
        module = _module_that_raised(error)
        item = _running[-1] if _running else None
        is_random = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if module is None or item is None or is_random or item.get_closest_marker("slow"):
            return
        kind, message = type(error).__name__, _as_cell(str(error))
        if self.mode == "write":
            item.user_properties.append((PROPERTY, (module, kind, message)))
        elif (kind, message) not in self.known:
            pytest.fail(
                f"{PAGE.relative_to(ROOT)} has no {kind} that says {message!r}. If that is what users should read, run "
                "'make errors' and look at the difference."
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        _running.append(item)
        try:
            return (yield)
        finally:
            _running.pop()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == PROPERTY:
                    module, kind, message = value
                    case = _in_words(report.nodeid)
                    known = self.cases.setdefault(module, {}).setdefault((kind, message), case)
                    self.cases[module][kind, message] = min(known, case)

    def pytest_sessionfinish(self, session):
        is_whole = session.testsfailed == 0 and not session.config.getoption("keyword")
        if self.mode == "write" and is_whole and not hasattr(session.config, "workerinput"):
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(_page(self.cases))


def _module_that_raised(error):
    """Name of the module of the package whose code raised, `None` for errors of others."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    path = Path(frames.tb_frame.f_code.co_filename) if frames is not None else Path()
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts) if path.is_relative_to(SOURCES) else None


def _as_cell(message):
    """One line of a table, without what differs from run to run."""
    message = re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "…/", message)
    message = re.sub(r"0x[0-9a-f]{6,}", "0x…", message).replace("<", "&lt;").replace("*", "\\*")
    return "<br>".join(" ".join(line.split()) for line in message.strip().splitlines()).replace("|", "\\|")


def _in_words(nodeid):
    test, _, parameters = nodeid.partition("[")
    words = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    parameters = parameters.removesuffix("]").replace("|", "\\|")
    return f"{words}: {parameters}" if parameters else words


def _page(cases):
    count = sum(len(rows) for rows in cases.values())
    parts = [HEAD, f"{count} messages.\n"]
    for module in sorted(cases):
        rows = sorted((case, kind, message) for (kind, message), case in cases[module].items())
        parts.append(f"## `{module}`\n\n{TABLE}")
        parts.append("\n".join(f"| {case} | `{kind}` | {message} |" for case, kind, message in rows) + "\n")
    return "\n".join(parts)
