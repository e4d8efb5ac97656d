"""What tests need from PyPI besides the environment, in `$PEFT_MOE_CACHE` or `~/.cache/peft_moe`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cached_folder(name: str, build: Callable[[Path], None], *, download: bool) -> Path:
    """The folder `name` of the cache. Built beside its final place and renamed, it exists only when it is whole.

    Args:
        name: Of the folder, with the version of what is in it.
        build: Makes the folder that it is given.
        download: Whether to build what is not there.

    Raises:
        RuntimeError: It is not there and `download` is not set.
    """
    cache = Path(os.environ.get("PEFT_MOE_CACHE") or "~/.cache/peft_moe").expanduser()
    target = cache / name
    if target.is_dir():
        return target
    if not download:
        raise RuntimeError(f"{name} is not in {cache}. Run 'make test-assets', which puts it there.")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.") as scratch:
            built = Path(scratch) / name
            build(built)
            built.rename(target)
    return target
