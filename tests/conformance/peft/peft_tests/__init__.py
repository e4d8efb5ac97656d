"""PEFT's own tests as a package: `from conformance.peft.peft_tests.test_config import TestPeftConfig`.

Its modules are those of the source distribution of the installed version; what they fetch or import from elsewhere
comes from `stand_ins`. Importing it raises `RuntimeError` where the distribution is not in the cache.
"""

import importlib.util
import sys
from typing import Any

from conformance.peft import stand_ins
from upstream.fetch import sdist_tests


_folder = sdist_tests("peft")
__path__.append(str(_folder / "tests"))
if importlib.util.find_spec("parameterized") is None:
    sys.path.append(str(_folder / "packages"))

_helpers = importlib.import_module(f"{__name__}.testing_utils")
stand_ins.put_into(_helpers)


def module(name: str) -> Any:
    """One of the modules.

    Raises:
        ImportError: this version has no such module.
    """
    with stand_ins.needed_by_imports():
        return importlib.import_module(f"{__name__}.{name}")
