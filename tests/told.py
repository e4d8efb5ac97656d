"""What a child process tells the test that started it about an error, for the page that `error_table` writes."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path


SOURCES = Path(__file__).parents[1] / "src"
# names the file that a listening test reads
VARIABLE = "PEFT_MOE_TESTS_TOLD"


def tell(error: BaseException) -> str:
    """The message of an error that the test is going to look at."""
    module = module_that_raised(error)
    if module is not None and VARIABLE in os.environ:
        line = json.dumps([module, type(error).__name__, str(error)])
        with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    return str(error)


def module_that_raised(error: BaseException) -> str | None:
    """Name of the module of the package whose code raised, `None` for errors of others."""
    frames = traceback.extract_tb(error.__traceback__)
    return module_in(frames[-1].filename) if frames else None


def module_in(file: str) -> str | None:
    """Name of a module of the package, `None` for other files."""
    path = Path(file)
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts) if path.is_relative_to(SOURCES) else None
