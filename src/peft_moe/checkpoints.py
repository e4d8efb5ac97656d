"""`find_intact_checkpoint`: the newest checkpoint that loads, of a training that may have been killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from safetensors import safe_open


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # of all files that every checkpoint has, the one that Trainer writes last
INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"  # there while Trainer saves with enable_jit_checkpoint
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "adapter_model.bin", "pytorch_model.bin")
SHARDED_TRAINING = ("global_step*", "*fsdp*", "optimizer_*", "rank*-of-*")


class CheckpointDamage(Exception):
    """What is wrong with a checkpoint."""


def find_intact_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a `Trainer` that is complete and readable.

    Does for a training that may have been killed what `transformers.trainer_utils.get_last_checkpoint` does for one
    that has not: each checkpoint that is skipped is logged as a warning that says what is wrong with it. Nothing is
    changed, and no pickle is loaded.

    `trainer_state.json` has to be there, which `Trainer` writes last, and of the step in the name of the folder;
    weights have to be readable to the last byte (safetensors), or have the right checksums (files of `torch.save`:
    optimizer, scheduler, random states). Wrong numbers inside safetensors data of the right size go unnoticed.

    Args:
        output_dir (`str` or `os.PathLike`): `TrainingArguments.output_dir`. It need not exist yet.

    Returns:
        `str`, *optional*: the folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is none.

    Raises:
        ValueError: none is known to be whole, and FSDP or DeepSpeed has written one at least, whose parts are not
        known.
            Training that begins anew would overwrite it.
        OSError: a checkpoint cannot be read, for example for lack of permission.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset)
    >>> trainer.train(resume_from_checkpoint=find_intact_checkpoint(args.output_dir))
    ```
    """
    sharded = []
    for step, folder in sorted(_checkpoints(Path(output_dir)), reverse=True):
        if any(any(folder.glob(pattern)) for pattern in SHARDED_TRAINING):
            logger.warning(f"Skipped {str(folder)!r}, which FSDP or DeepSpeed has written: it may lack a part.")
            sharded.append(str(folder))
            continue
        try:
            _check(folder, step)
        except (CheckpointDamage, FileNotFoundError) as damage:
            logger.warning(f"Skipped the checkpoint {str(folder)!r}, which is not whole: {damage}.")
        else:
            return str(folder)
    if sharded:
        raise ValueError(
            f"No checkpoint is known to be whole, and {', '.join(sharded)} cannot be judged, as FSDP or DeepSpeed "
            "wrote them. Pass one to resume_from_checkpoint yourself if you know that it is whole. To begin anew, "
            "move them away."
        )
    return None


def _checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of each checkpoint, in no order."""
    for folder in output_dir.iterdir() if output_dir.exists() else ():
        name = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if name and folder.is_dir():
            yield int(name[1]), folder


def _check(folder: Path, step: int) -> None:
    """Raise [`CheckpointDamage`] if the checkpoint is not whole."""
    if (folder / INCOMPLETE_FILE).exists():
        raise CheckpointDamage(f"{INCOMPLETE_FILE} says so")
    if (found := _read_json(folder / STATE_FILE).get("global_step")) != step:
        raise CheckpointDamage(f"{STATE_FILE} is of step {found}")
    adapters = {path.parent for path in (*folder.glob("*/adapter_config.json"), *folder.glob("*/adapter_model.*"))}
    for adapter in sorted(adapters):
        _check_weights(adapter)
    if not adapters or any(folder.glob("adapter_*")):
        _check_weights(folder)
    _check_training_state(folder)


def _check_weights(folder: Path) -> None:
    indices = list(folder.glob("*model.*.index.json"))
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found and not indices:
        raise CheckpointDamage(
            f"{folder.name} holds no weights, such as adapter_model.safetensors or model.safetensors"
        )
    for path in found:
        _check_tensors(path)
        if path.name.startswith("adapter_model") and "peft_type" not in _read_json(folder / "adapter_config.json"):
            raise CheckpointDamage("adapter_config.json names no peft_type")
    for index in indices:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointDamage(f"{index.name} has no weight_map")
        for shard in sorted(set(weight_map.values())):
            names = _check_tensors(folder / shard)
            expected = {name for name, its_shard in weight_map.items() if its_shard == shard}
            if names is not None and (absent := sorted(expected - names)):
                raise CheckpointDamage(f"{shard} lacks {len(absent)} tensors of {index.name}, for example {absent[0]}")
    if (folder / "config.json").exists():
        _read_json(folder / "config.json")


def _check_training_state(folder: Path) -> None:
    """Optimizer, scheduler and random states are there together or, with `save_only_model`, not at all."""
    found = {
        path.name for pattern in ("rng_state*.pth", "optimizer.pt", "scheduler.pt") for path in folder.glob(pattern)
    }
    has_random_state = any(name.startswith("rng_state") for name in found)
    absent = [name for name in ("optimizer.pt", "scheduler.pt") if name not in found]
    absent += [] if has_random_state else ["rng_state.pth"]
    if found and absent:
        raise CheckpointDamage(f"{' and '.join(absent)} missing")
    for name in (*sorted(found), "scaler.pt", "training_args.bin"):
        if (folder / name).exists():
            _check_archive(folder / name)


def _check_tensors(path: Path) -> set[str] | None:
    """Read a file of weights; the names of its tensors, or `None` where they are in a pickle."""
    if path.suffix != ".safetensors":
        _check_archive(path)
        return None
    # opening compares the header with the size of the file
    with _reading(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


def _check_archive(path: Path) -> None:
    """Compare the checksums in a file of `torch.save`, a zip archive with a pickle inside that is not loaded."""
    with _reading(path), ZipFile(path) as archive:
        damaged = archive.testzip()
        is_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    if damaged is not None:
        raise CheckpointDamage(f"{path.name} is damaged at {damaged} (checksum)")
    if not is_torch:
        raise CheckpointDamage(f"{path.name} is no file of torch.save")


def _read_json(path: Path) -> dict[str, Any]:
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointDamage(f"{path.name} holds no dictionary")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a reader makes of wrong bytes into damage, and leave errors of the system as they are."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a null byte is that of no file either
        is_file = False
    if not is_file:
        raise CheckpointDamage(f"{path.name} is missing")
    with path.open("rb") as file:
        file.read(1)  # some readers hide why they could not
    try:
        yield
    except Exception as error:
        # bytes may send a reader to a position before the file (EINVAL); any other number is an error of the system
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise CheckpointDamage(f"{path.name} cannot be read ({error})") from error
