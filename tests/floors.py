"""Prints the lower bounds of `install_requires` in setup.py as pins: `pip install -e '.[test]' $(python tests/floors.py)`."""

import re
from pathlib import Path


def floors(setup_text: str) -> list[str]:
    """Every `name>=version` of the list REQUIRED, as `name==version`."""
    required = re.search(r"^REQUIRED = \[(.*?)^\]", setup_text, re.DOTALL | re.MULTILINE)
    if required is None:
        raise SystemExit("setup.py has no list REQUIRED = [...], from which the oldest versions are read.")
    return [f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\w.]+)', required.group(1))]


if __name__ == "__main__":
    print(" ".join(floors((Path(__file__).parents[1] / "setup.py").read_text())))
