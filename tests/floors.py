"""Prints the lower bounds in setup.py as pins: `pip install -e '.[test]' $(python tests/floors.py)`.

They are those of `install_requires`, and of the extra `quantization`: torchao names no version of torch, so that pip takes
the newest, which cannot be imported with the oldest torch.
"""

import re
from pathlib import Path


LISTS = {"REQUIRED": r"^REQUIRED = \[(.*?)^\]", "EXTRAS['quantization']": r'^    "quantization": \[(.*?)\]'}


def floors(setup_text: str) -> list[str]:
    """Every `name>=version` of these lists, as `name==version`."""
    pins = []
    for name, pattern in LISTS.items():
        found = re.search(pattern, setup_text, re.DOTALL | re.MULTILINE)
        if found is None:
            raise SystemExit(f"setup.py has no list {name}, from which the oldest versions are read.")
        pins += [f"{package}=={version}" for package, version in re.findall(r'"([\w-]+)>=([\w.]+)', found.group(1))]
    return pins


if __name__ == "__main__":
    print(" ".join(floors((Path(__file__).parents[1] / "setup.py").read_text())))
