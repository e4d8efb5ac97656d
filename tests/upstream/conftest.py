"""Keeps the shared tests out of runs that leave out slow tests."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from upstream.fetch import sdist_tests


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Merely naming the shared tests takes as long as many a fast test."""
    return True if "not slow" in config.getoption("markexpr") else None


def pytest_configure(config) -> None:
    """Makes the markers of the shared tests known, which have no effect here."""
    sources = [Path(find_spec("transformers").origin).parent / "testing_utils.py"]
    try:
        sources += (sdist_tests("transformers") / "tests").glob("test_*.py")
    except RuntimeError:
        return
    names = {name for source in sources for name in re.findall(r"\bmark\.(\w+)", source.read_text(encoding="utf-8"))}
    for name in sorted(names):
        config.addinivalue_line("markers", f"{name}: of transformers' shared tests")
