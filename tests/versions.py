"""Runs the tests on other versions: `python tests/versions.py [floor] [newest] [registration]`, all three by default.

floor: the fast tests on the oldest supported versions, on Python 3.10. newest: the fast tests on what PyPI has today, on
Python 3.13. registration: on every Python from 3.10 to 3.13, the tests of importing and registering, with the pinned
versions (torch may be newer, where the pinned one has no build). Environments are made in `.venv-<name>/` and are kept.
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

from floors import floors


ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
REPORT = "import sys, importlib.metadata as m; print(sys.version.split()[0], *(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"


@dataclass(frozen=True)
class Row:
    """One environment and what is run in it."""

    name: str
    python: str
    pins: str
    selection: str = ""

    def run(self) -> tuple[bool, str]:
        """Whether the tests passed, and which versions those were."""
        python = interpreter(self.python)
        if python is None:
            return False, f"python{self.python} was not found: install it, or run the rows that need another one"
        venv = ROOT / f".venv-{self.name}"
        if "--upgrade" in self.pins:
            # pip is asked again what the newest is
            for mark in venv.glob(".installed-*"):
                mark.unlink()
        arguments = [f"VENV={venv.name}", f"PYTHON={python}", f"PINS={self.pins}", f"PYTEST_ARGS={self.selection}"]
        command = ["make", "--no-print-directory", "test-fast", *arguments]
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


def rows() -> dict[str, list[Row]]:
    """What the names on the command line stand for."""
    lowest = " ".join(floors((ROOT / "setup.py").read_text()))
    pins = "-c constraints.txt"
    return {
        "floor": [Row("floor", "3.10", lowest)],
        "newest": [Row("newest", "3.13", "--upgrade --upgrade-strategy eager")],
        "registration": [Row(f"py{v}", v, pins, "-k 'test_registration or test_import'") for v in PYTHONS],
    }


def main() -> None:
    """Runs what is asked for and prints a line for each; exits with 1 if one failed."""
    known = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}; default: all")
    names = parser.parse_args().names or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    results = [(row, *row.run()) for name in names for row in known[name]]
    print("\n| environment | result | versions |\n|---|---|---|")
    for row, passed, versions in results:
        print(f"| {row.name} | {'passed' if passed else 'FAILED'} | {versions} |")
    sys.exit(not all(passed for _, passed, _ in results))


if __name__ == "__main__":
    main()
