"""The tests of transformers and of PEFT, taken from the source distributions of the installed versions into a cache
outside git.

`python tests/upstream/fetch.py` fetches them and prints their folders. Beside each lies `parameterized`, which they
import.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asset_cache import cached_folder  # noqa: E402


PACKAGES = ("transformers", "peft")
PARAMETERIZED = "0.9.0"
PARAMETERIZED_SHA256 = "4e0758e3d41bea3bbd05ec14fc2c24736723f243b28d702081aef438c9372b1b"


def sdist_tests(package: str, *, download: bool = False) -> Path:
    """Folder with `tests/`, as the source distribution has it, and `packages/`, to be put on the path.

    Args:
        package: One of `PACKAGES`.
        download: Fetch what is not there (11 MB for transformers, 1 MB for PEFT).

    Raises:
        RuntimeError: It is not there and `download` is not set, or it cannot be downloaded.
    """
    installed = version(package)

    def unpack(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            _unpack_tests(_download(f"{package}=={installed}", "--no-binary", Path(downloads)), folder)
            _unpack_parameterized(
                _download(f"parameterized=={PARAMETERIZED}", "--only-binary", Path(downloads)), folder
            )

    return cached_folder(f"{package}-{installed}-tests", unpack, download=download)


def _download(requirement: str, format_flag: str, folder: Path) -> Path:
    """The one file that pip puts into the empty subfolder. Of a source distribution pip reads only metadata."""
    folder = folder / requirement
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    print(f"Downloading {requirement}", file=sys.stderr, flush=True)
    run = subprocess.run(
        [*command, format_flag, ":all:", "--dest", str(folder), requirement], capture_output=True, text=True
    )
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if run.returncode != 0 or len(files) != 1:
        raise RuntimeError(
            f"pip could not download {requirement} with {format_flag}. Its last words: {run.stderr.strip()[-500:]!r}. "
            "Check the network, then run this again; a version that is not on PyPI has no source distribution."
        )
    return files[0]


def _unpack_tests(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts[1:]
            if member.isfile() and parts[:1] == ("tests",) and ".." not in parts:
                path = folder.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not (folder / "tests").is_dir():
        raise RuntimeError(f"{archive.name} has no folder 'tests': they cannot be run for this version.")


def _unpack_parameterized(wheel: Path, folder: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != PARAMETERIZED_SHA256:
        raise RuntimeError(
            f"{wheel.name} has sha256 {found}, but {PARAMETERIZED_SHA256} was expected: the download was damaged or "
            "the package was replaced. Run this again, and if it repeats do not use the file."
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("parameterized/") and name.endswith(".py") and "/test" not in name:
                archive.extract(name, folder / "packages")


def main() -> None:
    """Fetches the tests. Where they cannot be had, what needs them is skipped, so that is no error."""
    for package in PACKAGES:
        try:
            print(sdist_tests(package, download=True))
        except RuntimeError as error:
            print(f"{error} The tests that need those of {package} will be skipped.", file=sys.stderr)


if __name__ == "__main__":
    main()
