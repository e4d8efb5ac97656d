"""DeepSpeed, built without its compiled parts into a cache outside git, for the tests that need it.

`python tests/distributed/fetch_deepspeed.py` builds it and prints its folder (27 MB). It is not installed into the
environment: its presence alone changes what accelerate and transformers import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asset_cache import cached_folder  # noqa: E402


VERSION = "0.19.8"
# those of its requirements that the tests do not install anyway
REQUIREMENTS = ("einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4", "ninja==1.13.2", "py-cpuinfo==9.0.0")


def deepspeed_packages(*, download: bool = False) -> Path:
    """Folder to be put at the end of the path.

    Args:
        download: Fetch and build what is not there.

    Raises:
        RuntimeError: It is not there and `download` is not set, or it cannot be built.
    """
    return cached_folder(f"deepspeed-{VERSION}", _install, download=download)


def _install(folder: Path) -> None:
    print(f"Building deepspeed {VERSION}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(folder), f"deepspeed=={VERSION}", *REQUIREMENTS]
    run = subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, capture_output=True, text=True)
    if run.returncode != 0 or not (folder / "deepspeed").is_dir():
        raise RuntimeError(f"pip could not build deepspeed {VERSION}. Its last words: {run.stderr.strip()[-500:]!r}.")


def main() -> None:
    """Builds it. Where it cannot be had, what needs it is skipped, so that is no error."""
    try:
        print(deepspeed_packages(download=True))
    except RuntimeError as error:
        print(f"{error} The tests of DeepSpeed will be skipped.", file=sys.stderr)


if __name__ == "__main__":
    main()
