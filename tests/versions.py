"""Runs `make test-fast` or another target on other versions: `make test-fast VERSIONS="floor newest registration"`.

floor: the oldest supported versions, on Python 3.10. newest: what PyPI has today, on Python 3.13; before a release,
run all tests there by `make test-all VERSIONS=newest`. registration: on every Python from 3.10 to 3.13, only the tests
of importing and registering, with the pinned versions (torch may be newer, where the pinned one has no build). Where
that Python is missing, floor and newest take the one that runs this. Environments are made in `.venv-<name>/` and are
kept.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# lists in setup.py whose lower bounds are the floor. torchao names no version of torch, so that pip would take the
# newest, which cannot be imported with the oldest torch
FLOORS = {"REQUIRED": r"^REQUIRED = \[(.*?)^\]", "EXTRAS['quantization']": r'^    "quantization": \[(.*?)\]'}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
REPORT = """
import sys, importlib.metadata as metadata
print(sys.version.split()[0], *(f"{p} {metadata.version(p)}" for p in sys.argv[1:]), sep=", ")
"""


@dataclass(frozen=True)
class Row:
    """One environment and what is run in it."""

    name: str
    python: str
    pins: str
    selection: str = ""
    needs_this_python: bool = False

    def run(self, target: str) -> tuple[bool, str]:
        """Whether the tests passed, and which versions those were."""
        python = interpreter(self.python) or (None if self.needs_this_python else sys.executable)
        if python is None:
            return False, f"python{self.python} was not found: install it, or leave registration out"
        venv = ROOT / f".venv-{self.name}"
        if "--upgrade" in self.pins:
            # pip is asked again what the newest is
            for mark in venv.glob(".installed-*"):
                mark.unlink()
        arguments = [f"VENV={venv.name}", f"PYTHON={python}", f"PINS={self.pins}", "VERSIONS="]
        if self.selection:
            arguments.append(f"PYTEST_ARGS={self.selection}")
        command = ["make", "--no-print-directory", target, *arguments]
        passed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PIP_NO_INPUT": "1"}).returncode == 0
        if not (venv / "bin/python").exists():
            return False, "the environment could not be made"
        report = subprocess.run([venv / "bin/python", "-c", REPORT, *PACKAGES], capture_output=True, text=True)
        return passed, report.stdout.strip() or "not everything could be installed"


def interpreter(version: str) -> str | None:
    """Path of a Python of this minor version: one that is on the path and starts, or the newest that pyenv has."""
    on_path = shutil.which(f"python{version}")
    if on_path is not None and subprocess.run([on_path, "--version"], capture_output=True).returncode == 0:
        return on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    installed = pyenv.glob(f"versions/{version}.*/bin/python")
    newest = max(installed, key=lambda path: [int(n) for n in re.findall(r"\d+", path.parts[-3])], default=None)
    return None if newest is None else str(newest)


def floors(setup_text: str) -> list[str]:
    """Every `name>=version` of these lists, as `name==version`."""
    pins = []
    for name, pattern in FLOORS.items():
        found = re.search(pattern, setup_text, re.DOTALL | re.MULTILINE)
        if found is None:
            raise SystemExit(f"setup.py has no list {name}, from which the oldest versions are read.")
        pins += [f"{package}=={version}" for package, version in re.findall(r'"([\w-]+)>=([\w.]+)', found.group(1))]
    return pins


def rows() -> dict[str, list[Row]]:
    """What the names on the command line stand for."""
    lowest = " ".join(floors((ROOT / "setup.py").read_text()))
    pins = "-c constraints.txt"
    return {
        "floor": [Row("floor", "3.10", lowest)],
        "newest": [Row("newest", "3.13", "--upgrade --upgrade-strategy eager")],
        "registration": [Row(f"py{v}", v, pins, "-k 'test_registration or test_import'", True) for v in PYTHONS],
    }


def main() -> None:
    """Runs what is asked for and prints a line for each; exits with 1 if one failed."""
    known = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="name", help=f"of {', '.join(known)}")
    parser.add_argument("--target", default="test-fast", help="of the Makefile")
    arguments = parser.parse_args()
    names = arguments.names
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    results = [(row, *row.run(arguments.target)) for name in names for row in known[name]]
    print("\n| environment | result | versions |\n|---|---|---|")
    for row, passed, versions in results:
        print(f"| {row.name} | {'passed' if passed else 'FAILED'} | {versions} |")
    sys.exit(not all(passed for _, passed, _ in results))


if __name__ == "__main__":
    main()
