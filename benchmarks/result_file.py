"""Writes result files: whole at any moment, so that a run that is cut off keeps what it has."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """`--name` and `--results`."""
    parser.add_argument("--name", default=name, help="name of the result file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write `<results>/<name>.json` in one step."""
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{options.name}.json"
    partial = file.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)


def settings(options: argparse.Namespace, *leave_out: str) -> dict[str, Any]:
    """Options as a result file keeps them."""
    skipped = {"results", "name", *leave_out}
    return {key: value for key, value in vars(options).items() if key not in skipped}
