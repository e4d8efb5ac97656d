"""The page of errors says what tests see: in this process, in the log and in processes that they start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import error_table
from error_table import as_cell, as_page, read, remaining, row


ROWS = {
    row("peft_moe.a", "ValueError", "r is 0."): ("case: x\\|y", "r is 0."),
    row("peft_moe.a", "warning", "3 files \\| are old."): ("other case", "3 files \\| are old."),
    row("peft_moe.b", "OSError", "No <br>room."): ("case", "No <br>room."),
}

CONFTEST = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(Path(__file__).parent)!r})
import error_table
from error_table import pytest_addoption, pytest_configure

error_table.ROOT = Path(__file__).parent
error_table.PAGE = error_table.ROOT / "errors.md"
"""
TESTS = """
import logging, subprocess, sys

import pytest
import torch

import told
from peft_moe import losses
from peft_moe.kernels.plan import DispatchPlan

CHILD = '''
import sys
sys.path.insert(0, sys.argv[1])
from told import tell
try:
    exec(compile("raise KeyError('in a child')", sys.argv[2], "exec"))
except KeyError as error:
    tell(error)
'''

@pytest.mark.parametrize("num_experts", [0, -1])
def test_raises(num_experts):
    with pytest.raises(ValueError, match="num_experts"):
        DispatchPlan.from_index(torch.zeros(2, 1, dtype=torch.int64), num_experts)

@pytest.mark.exhaustive
def test_raises_where_time_does_not_matter():
    with pytest.raises(ValueError, match="int64"):
        DispatchPlan.from_index(torch.zeros(2), 1)

def test_log(caplog):
    logger = logging.getLogger("peft_moe.losses")
    logger.handle(logger.makeRecord(logger.name, logging.WARNING, losses.__file__, 1, "It is %s.", ("late",), None))

def test_child():
    subprocess.run([sys.executable, "-c", CHILD, told.__file__.rpartition("/")[0], losses.__file__], check=True)
"""


def run(folder: Path, *arguments: str) -> str:
    """What pytest says in a process of its own, whose table is another."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=exhaustive", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200).stdout


@pytest.mark.slow
def test_table_is_written_and_checked(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    assert "5 passed" in run(tmp_path, "--error-table=write")
    page = tmp_path / "errors.md"
    assert [(module, kind, *said) for (module, kind, _), said in read(page.read_text()).items()] == [
        (
            "peft_moe.kernels.plan",
            "ValueError",
            "raises: -1",
            "DispatchPlan needs num_experts >= 1, but got -1. Pass the router's E.",
        ),
        ("peft_moe.losses", "KeyError", "child", "'in a child'"),
        ("peft_moe.losses", "warning", "log", "It is late."),
    ]
    page.write_text(page.read_text().replace("It is late.", "It was late.").replace("in a child", "in another"))
    said = run(tmp_path, "--error-table=check")
    assert "2 failed, 3 passed" in said
    assert "errors.md has no warning of peft_moe.losses that says 'It is late.'" in said


def test_page_is_read_as_it_was_written():
    assert read(as_page(ROWS)) == ROWS
    page = error_table.PAGE.read_text(encoding="utf-8")
    assert as_page(read(page)) == page


def test_numbers_and_folders_make_no_other_message():
    assert as_cell("'/tmp/a/b.json' has 12 bytes | <5>") == "'…/b.json' has 12 bytes \\| &lt;5>"
    assert row("m", "k", "12 of 1.5 bytes, float32, layers.3") == row("m", "k", "7 of 20 bytes, float32, layers.3")
    assert row("m", "k", "float32") != row("m", "k", "float16")


@pytest.mark.parametrize(
    ("is_whole", "cases"), [(True, {"other case"}), (False, {"other case", "case"})], ids=["whole", "part"]
)
def test_rows_of_tests_that_did_not_run_to_their_end_stay(is_whole, cases):
    kept = remaining(ROWS, {"case: x\\|y", "other case"}, {"other case"}, is_whole=is_whole)
    assert {case for case, _ in kept.values()} == cases
