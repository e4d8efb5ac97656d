"""Importing the package is light and harmless, and its own imports point one way."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_moe


PACKAGE = Path(peft_moe.__file__).parent
HEAVY = ["triton", "sklearn", "datasets", "matplotlib", "sentence_transformers", "evaluate", "trl", "bitsandbytes"]

# lower floors know nothing of higher ones; parts on the same floor do not know each other
LADDER = [
    ["_version", "versions", "routing", "kernels", "sequence_state"],
    ["forward_context"],
    ["routing_recorder"],
    ["aux_loss", "foreign_moe"],
    ["tuners", "models"],
    ["monitoring", "metrics", "optimization", "env_report"],
    ["checkpoints"],
]
FLOOR = {part: floor for floor, parts in enumerate(LADDER) for part in parts}

SCRIPT = f"""
import json, sys
import peft
before = set(sys.modules)
import peft_moe
heavy = [name for name in {HEAVY} if name in sys.modules and name not in before]
members = [m.name for m in peft.PeftType]
import importlib
importlib.import_module("peft_moe")
exec("import peft_moe; from peft_moe import *")
again = [m.name for m in peft.PeftType]
print(json.dumps({{"heavy": heavy, "same": members == again, "count": members.count("MOLE")}}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    """What a fresh process sees."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_import_brings_no_optional_package(fresh_import):
    assert fresh_import["heavy"] == []


def test_import_twice_is_harmless(fresh_import):
    assert fresh_import["same"]
    assert fresh_import["count"] == 1


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Parts of our package that a file imports, wherever the import stands."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("peft_moe.")]
            found |= {part_of(name.removeprefix("peft_moe.")) for name in names}
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else list(base)
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_moe."):
            found.add(part_of(node.module.removeprefix("peft_moe.")))
        elif isinstance(node, ast.ImportFrom) and node.module == "peft_moe":
            found |= {alias.name for alias in node.names}
    return found - {"__version__"}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down_the_ladder(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOOR, f"{own} has no place on the ladder: give it one"
    for part in sorted(imports_of(path) - {own}):
        assert part in FLOOR, f"{path.name} imports {part}, which has no place on the ladder"
        assert FLOOR[part] < FLOOR[own], f"{path.relative_to(PACKAGE)} imports {part}, which stands above or beside it"


def test_kernel_backends_do_not_know_routers_or_recording():
    parts = set().union(*(imports_of(path) for path in (PACKAGE / "kernels").rglob("*.py")))
    assert parts <= {"kernels"}


@pytest.mark.parametrize(
    "module", ["triton", "sklearn", "datasets", "matplotlib", "sentence_transformers", "evaluate"]
)
def test_optional_packages_are_imported_inside_functions(module):
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        if "triton" in path.relative_to(PACKAGE).parts or path.relative_to(PACKAGE).parts[0] == "metrics":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            offenders += [str(path) for name in names if name.split(".")[0] == module]
    assert offenders == []


def test_public_names_exist():
    assert len(set(peft_moe.__all__)) == len(peft_moe.__all__)
    assert all(hasattr(peft_moe, name) for name in peft_moe.__all__)


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
