"""What `python -m peft_moe.env_report` prints."""

import subprocess
import sys

import pytest
import torch
from packaging.version import Version

from peft_moe import __version__
from peft_moe.env_report import DISTRIBUTIONS, env_report
from peft_moe.kernels import backend_report
from peft_moe.versions import installed_version


@pytest.mark.slow
def test_the_module_prints_the_report():
    run = subprocess.run([sys.executable, "-m", "peft_moe.env_report"], capture_output=True, text=True, check=True)
    sections = [line for line in run.stdout.splitlines() if line and not line.startswith(" ")]
    assert sections == ["Versions", "Devices", "Kernel backends"]


def test_every_package_has_a_line():
    report = env_report()
    for name in DISTRIBUTIONS:
        assert f"\n  {name} " in report
    assert __version__ in report
    assert Version(torch.__version__).base_version in report


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("peft_moe.env_report.DISTRIBUTIONS", ("no-such-distribution",))
    assert "no-such-distribution  not installed" in env_report()
    assert installed_version("no-such-distribution") is None


def test_every_backend_is_usable_or_says_why_not():
    report = env_report()
    for name, usable, reason in backend_report():
        lines = [line for line in report.splitlines() if line.split()[:1] == [name] and "usable" in line]
        assert len(lines) == 1  # `triton` is the name of a package, too
        assert usable or reason in lines[0]
