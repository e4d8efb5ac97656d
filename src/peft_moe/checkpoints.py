"""`find_intact_checkpoint`: the newest checkpoint that loads, of a training that may have been killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
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
        ValueError: none is known to be whole, and FSDP or DeepSpeed, whose parts are not known, has written one at
            least. Training that begins anew would overwrite it.
        OSError: a checkpoint cannot be read, for example for lack of permission.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset)
    >>> trainer.train(resume_from_checkpoint=find_intact_checkpoint(args.output_dir))
    ```
    """
    root, sharded = Path(output_dir), []
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.exists() else []
    names = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in folders]
    for step, folder in sorted(((int(name[1]), folder) for name, folder in names if name), reverse=True):
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


def _check(folder: Path, step: int) -> None:
    """Raise [`CheckpointDamage`] if the checkpoint is not whole."""
    if (folder / INCOMPLETE_FILE).exists():
        raise CheckpointDamage(f"{INCOMPLETE_FILE} says so")
    if (found := _read(folder / STATE_FILE).get("global_step")) != step:
        raise CheckpointDamage(f"{STATE_FILE} is of step {found}")
    adapters = {path.parent for path in (*folder.glob("*/adapter_config.json"), *folder.glob("*/adapter_model.*"))}
    for adapter in sorted(adapters):
        _check_weights(adapter)
    if not adapters or any(folder.glob("adapter_*")):
        _check_weights(folder)
    # these are there together or, with `save_only_model`, not at all
    states = {name: [*folder.glob(name)] for name in ("optimizer.pt", "scheduler.pt", "rng_state*.pth")}
    absent = [name.replace("*", "") for name, files in states.items() if not files]
    if 0 < len(absent) < len(states):
        raise CheckpointDamage(f"{' and '.join(absent)} missing")
    for path in (*sum(states.values(), []), folder / "scaler.pt", folder / "training_args.bin"):
        if path.exists():
            _read(path)


def _check_weights(folder: Path) -> None:
    indices = list(folder.glob("*model.*.index.json"))
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found and not indices:
        raise CheckpointDamage(
            f"{folder.name} holds no weights, such as adapter_model.safetensors or model.safetensors"
        )
    for path in found:
        _read(path)
        if path.name.startswith("adapter_model") and "peft_type" not in _read(folder / "adapter_config.json"):
            raise CheckpointDamage("adapter_config.json names no peft_type")
    for index in indices:
        weight_map = _read(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointDamage(f"{index.name} has no weight_map")
        for shard in sorted(set(weight_map.values())):
            names = _read(folder / shard)
            expected = {name for name, its_shard in weight_map.items() if its_shard == shard}
            if names is not None and (absent := sorted(expected.difference(names))):
                raise CheckpointDamage(f"{shard} lacks {len(absent)} tensors of {index.name}, for example {absent[0]}")
    if (folder / "config.json").exists():
        _read(folder / "config.json")


def _read(path: Path) -> Any:
    """Read a file: the dictionary of a json file, the names of tensors in safetensors, `None` for one of torch.save.

    What a reader makes of wrong bytes becomes damage; errors of the system stay as they are.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a null byte is that of no file either
        is_file = False
    if not is_file:
        raise CheckpointDamage(f"{path.name} is missing")
    with path.open("rb") as file:
        file.read(1)  # some readers hide why they could not
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise CheckpointDamage(f"{path.name} holds no dictionary")
            return content
        if path.suffix == ".safetensors":
            # opening compares the header with the size of the file
            with safe_open(path, framework="pt") as tensors:
                return set(tensors.keys())
        # a zip archive with checksums, and with a pickle inside that is not loaded
        with ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise CheckpointDamage(f"{path.name} is damaged at {damaged} (checksum)")
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise CheckpointDamage(f"{path.name} is no file of torch.save")
    except Exception as error:
        # bytes may send a reader to a position before the file (EINVAL); any other number is an error of the system
        is_of_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_of_system or isinstance(error, CheckpointDamage):
            raise
        raise CheckpointDamage(f"{path.name} cannot be read ({error})") from error
    return None
