"""transformers' shared tests as a package: `from upstream.transformers_tests.test_modeling_common import ...`.

Its modules are those of the source distribution of the installed version. What the distribution lacks comes from
`upstream.stand_ins`. Importing it raises `RuntimeError` where the distribution is not in the cache.
"""

import importlib.util
import os
import sys
import types
from unittest import mock

import transformers.utils

from upstream import stand_ins
from upstream.fetch import sdist_tests


# accelerators have their own tests; these compare two models on the CPU
os.environ["TRANSFORMERS_TEST_DEVICE"] = "cpu"

_folder = sdist_tests("transformers")
__path__.append(str(_folder / "tests"))
if importlib.util.find_spec("parameterized") is None:
    sys.path.append(str(_folder / "packages"))


def _stand_in_for(name: str) -> None:
    """Makes `name`, a module that the distribution lacks, an alias of `upstream.stand_ins`."""
    parent = f"{__name__}.{name.rpartition('.')[0]}" if "." in name else __name__
    if parent not in sys.modules and importlib.util.find_spec(parent) is None:
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = []
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        sys.modules[f"{__name__}.{name}"] = stand_ins


for _name in (
    "distributed_testing_utils",
    "exporters.test_export",
    "generation.test_utils",
    "utils.test_configuration_utils",
):
    _stand_in_for(_name)

# the shared tests would load a second transformers from beside themselves, where the distribution has its sources
mock.patch.object(transformers.utils, "direct_transformers_import", lambda *args, **kwargs: transformers).start()
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(stand_ins.empty_tiny_model_folder())
