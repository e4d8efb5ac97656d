"""Training that was killed: find the newest checkpoint that is whole, and mark the ones that are."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from accelerate import PartialState
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .monitoring.trainer_view import checkpoint_folder


logger = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint_manifest.json"
MANIFEST_FORMAT = 1
STATE_FILE = "trainer_state.json"  # of all files that every checkpoint has, the one that Trainer writes last
INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"  # there while Trainer saves with enable_jit_checkpoint
WEIGHTS = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARDED_TRAINING = ("global_step*", "*fsdp*", "optimizer_*", "rank*-of-*")
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # of file systems that cannot flush a folder


class CheckpointDamage(Exception):
    """What is wrong with a checkpoint."""


class CheckpointUndecided(Exception):
    """Why there is no telling whether a checkpoint is whole."""


def find_intact_checkpoint(output_dir: str | os.PathLike[str], *, require_manifest: bool = False) -> str | None:
    """The newest checkpoint of a `Trainer` that is complete and readable.

    Does for a training that may have been killed what `transformers.trainer_utils.get_last_checkpoint` does for one that
    has not: each checkpoint that is skipped is logged as a warning that says what is wrong with it. Nothing is changed,
    and no pickle is loaded.

    A checkpoint with the manifest of [`IntactCheckpointCallback`] has to agree with it, size and checksum of every file.
    Without one, `trainer_state.json` has to be there, which `Trainer` writes last, and of the step in the name of the
    folder; weights have to be readable to the last byte (safetensors), or have the right checksums (files of
    `torch.save`: optimizer, scheduler, random states). Damage inside safetensors data of the right size shows only with
    a manifest, and so does the lack of a file that not every checkpoint has. Checkpoints of FSDP and DeepSpeed need one.

    Args:
        output_dir (`str` or `os.PathLike`): `TrainingArguments.output_dir`. It need not exist yet.
        require_manifest (`bool`):
            Skip checkpoints without a manifest. They may have lost data if the whole machine went down.

    Returns:
        `str`, *optional*: the folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is none.

    Raises:
        ValueError: none is known to be whole, and there is no telling with one at least: it lacks the manifest that it
            needs, or has one of a newer version. Training that begins anew would overwrite it.
        OSError: a checkpoint cannot be read, for example for lack of permission.

    Example:

    ```py
    >>> trainer = Trainer(model, args, train_dataset=train_dataset, callbacks=[IntactCheckpointCallback()])
    >>> trainer.train(resume_from_checkpoint=find_intact_checkpoint(args.output_dir))
    ```
    """
    undecided = []
    for step, folder in sorted(_checkpoints(Path(output_dir)), reverse=True):
        try:
            _check(folder, step, require_manifest=require_manifest)
        except (CheckpointDamage, FileNotFoundError) as damage:
            logger.warning(f"Skipped the checkpoint {str(folder)!r}, which is not whole: {damage}.")
        except CheckpointUndecided as reason:
            logger.warning(f"Skipped the checkpoint {str(folder)!r}, which cannot be judged: {reason}.")
            undecided.append(f"{str(folder)!r}: {reason}")
        else:
            return str(folder)
    if undecided:
        raise ValueError(
            "No checkpoint is known to be whole, and there is no telling with "
            + "; ".join(undecided)
            + ". Pass one to resume_from_checkpoint yourself if you know that it is whole. To begin anew, move them away."
        )
    return None


class IntactCheckpointCallback(TrainerCallback):
    """Writes a manifest into each checkpoint once all of it is on the disk, for [`find_intact_checkpoint`].

    `Trainer` writes the files of a checkpoint one after the other into its final folder. A process that is killed
    meanwhile leaves a part of them; a machine that loses power may leave any of them empty. The manifest,
    `checkpoint_manifest.json`, comes last: when all processes have saved, every file is flushed to the disk, and sizes
    and checksums are written to a file that appears whole or not at all. Each checkpoint is read once for it.

    `Trainer` deletes old checkpoints before that. Let this callback do it instead: give `save_total_limit` to it, and
    not to `TrainingArguments`.

    Pass it on every process, and after callbacks that write into checkpoints.

    Args:
        save_total_limit (`int`, *optional*):
            How many checkpoints to keep, the newest and the best among them. The rest is deleted when the newest has its
            manifest, those first that have none or whose files have other sizes than in it. Links stay, and so do
            checkpoints of later steps, unless they lack `trainer_state.json`; neither count.

    Raises:
        ValueError: `save_total_limit` is less than 1, or training begins with one in `TrainingArguments`, with
            `enable_jit_checkpoint`, or as a hyperparameter search, whose folders callbacks are not told.
    """

    def __init__(self, *, save_total_limit: int | None = None) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit must be at least 1, or None to keep all, but is {save_total_limit!r}.")
        self.save_total_limit = save_total_limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would delete a checkpoint too early, change it later, or hide it."""
        if args.save_total_limit is not None:
            raise ValueError(
                f"TrainingArguments has save_total_limit={args.save_total_limit}, which deletes old checkpoints before the "
                "new one is safe. Leave it out there, and pass "
                f"IntactCheckpointCallback(save_total_limit={args.save_total_limit})."
            )
        if getattr(args, "enable_jit_checkpoint", False):  # not in every version
            raise ValueError(
                "TrainingArguments has enable_jit_checkpoint=True, which saves without telling callbacks, also into a "
                "checkpoint that has its manifest. Leave it out, or remove IntactCheckpointCallback."
            )
        if state.is_hyper_param_search:
            raise ValueError(
                "IntactCheckpointCallback does not know the folders of a hyperparameter search. Remove it from the search."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the manifest of the checkpoint that was just saved, then delete old ones."""
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        folder = Path(checkpoint_folder(args, state))
        write_manifest(folder, state.global_step)
        if self.save_total_limit is not None:
            protected = {folder.resolve(), Path(state.best_model_checkpoint or folder).resolve()}
            _delete_old(folder.parent, self.save_total_limit, step=state.global_step, protected=protected)


def write_manifest(folder: Path, step: int) -> None:
    """Flush every file in `folder` to the disk, then write their sizes and checksums, whole or not at all."""
    (folder / INCOMPLETE_FILE).unlink(missing_ok=True)  # of an earlier run that was killed at this step
    files = {}
    for path in _files(folder):
        try:
            _flush(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        except FileNotFoundError:
            logger.warning(f"{str(path)!r} was deleted meanwhile and is not in the manifest of its checkpoint.")
    # the names of the files have to be on the disk before that of the manifest, which vouches for them
    for directory in (folder.parent, folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush_folder(directory)
    manifest, staged = folder / MANIFEST_FILE, folder / f"{MANIFEST_FILE}.tmp"
    content = {"format_version": MANIFEST_FORMAT, "global_step": step, "files": files}
    staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _flush(staged)
    os.replace(staged, manifest)
    _flush_folder(folder)


def _files(folder: Path) -> list[Path]:
    """What a manifest vouches for: not itself, and nothing that an interrupted writer has left."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not path.name.startswith((MANIFEST_FILE, ".tmp"))]


def _checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of each checkpoint, in no order."""
    try:
        folders = list(output_dir.iterdir())
    except FileNotFoundError:
        return
    for folder in folders:
        name = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if name and folder.is_dir():
            yield int(name[1]), folder


def _delete_old(output_dir: Path, limit: int, *, step: int, protected: set[Path]) -> None:
    found = []
    for its_step, folder in _checkpoints(output_dir):
        if folder.is_symlink():
            continue
        if its_step <= step or _is_damaged(partial(_existing, folder / STATE_FILE)):
            is_marked = not _is_damaged(partial(_check_against_manifest, folder, its_step, sizes_only=True))
            found.append((is_marked, its_step, folder))
    deletable = sorted(entry for entry in found if entry[2].resolve() not in protected)
    for _, _, folder in deletable[: max(0, len(found) - limit)]:
        try:
            # first, so that what is left of it passes for a whole one at no time
            (folder / STATE_FILE).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"Could not delete the old checkpoint {str(folder)!r}: {error}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_damaged(check: Callable[[], object]) -> bool:
    """Whether a check finds damage. What cannot be judged or read is none."""
    try:
        check()
    except (CheckpointDamage, FileNotFoundError):
        return True
    except (CheckpointUndecided, OSError):
        pass
    return False


def _check(folder: Path, step: int, *, require_manifest: bool) -> None:
    """Raise [`CheckpointDamage`] if the checkpoint is not whole, [`CheckpointUndecided`] if there is no telling."""
    if (folder / INCOMPLETE_FILE).exists():
        raise CheckpointDamage(f"{INCOMPLETE_FILE} says so")
    if (folder / MANIFEST_FILE).exists():
        _check_against_manifest(folder, step)
        return
    state = _read_json(folder / STATE_FILE)
    if state.get("global_step") != step:
        raise CheckpointDamage(f"{STATE_FILE} is of step {state.get('global_step')}")
    if any(any(folder.glob(pattern)) for pattern in SHARDED_TRAINING):
        raise CheckpointUndecided(f"FSDP or DeepSpeed has written it, and without {MANIFEST_FILE} it may lack a part")
    adapters = [config.parent for config in folder.glob("*/adapter_config.json")]
    adapters += [weights.parent for weights in folder.glob("*/adapter_model.*") if weights.parent not in adapters]
    _check_weights(folder, is_required=not adapters)
    for adapter in adapters:
        _check_weights(adapter)
    _check_training_state(folder)
    if require_manifest:
        raise CheckpointUndecided(f"it has no {MANIFEST_FILE}, which require_manifest asks for")


def _check_against_manifest(folder: Path, step: int, *, sizes_only: bool = False) -> None:
    manifest = _read_json(folder / MANIFEST_FILE)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > MANIFEST_FORMAT:
        raise CheckpointUndecided(
            f"its {MANIFEST_FILE} has format {version}, but this version of peft_moe reads up to {MANIFEST_FORMAT}; "
            "run `pip install --upgrade peft-moe`"
        )
    try:
        is_known = version == MANIFEST_FORMAT
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError):
        is_known = False
    if not is_known:
        raise CheckpointDamage(f"this version of peft_moe cannot read its {MANIFEST_FILE}")
    if manifest.get("global_step") != step:
        raise CheckpointDamage(f"{MANIFEST_FILE} is of step {manifest.get('global_step')}")
    for name, (size, sha256) in entries.items():
        path = _existing(folder / name)
        if path.stat().st_size != size:
            raise CheckpointDamage(f"{name} has {path.stat().st_size} bytes, and had {size} when it was saved")
        if not sizes_only and _sha256(path) != sha256:
            raise CheckpointDamage(f"{name} has other content than when it was saved (checksum)")


def _check_weights(folder: Path, *, is_required: bool = True) -> None:
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found and (is_required or (folder / "adapter_config.json").exists()):
        raise CheckpointDamage(
            f"{folder.name} holds no weights, such as adapter_model.safetensors or model.safetensors"
        )
    for path in found:
        if path.suffix == ".json":
            _check_shards(path)
        else:
            _check_tensors(path)
        if path.name.startswith("adapter_model") and "peft_type" not in _read_json(folder / "adapter_config.json"):
            raise CheckpointDamage("adapter_config.json names no peft_type")
    if (folder / "config.json").exists():
        _read_json(folder / "config.json")


def _check_shards(index: Path) -> None:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointDamage(f"{index.name} has no weight_map")
    for shard in sorted(set(weight_map.values())):
        names = _check_tensors(index.parent / shard)
        expected = {name for name, its_shard in weight_map.items() if its_shard == shard}
        if names is not None and (absent := sorted(expected - names)):
            raise CheckpointDamage(f"{shard} lacks {len(absent)} tensors of {index.name}, for example {absent[0]}")


def _check_tensors(path: Path) -> set[str] | None:
    """Read a file of weights; the names of its tensors, or `None` where they are in a pickle."""
    if path.suffix != ".safetensors":
        _check_archive(path)
        return None
    # opening compares the header with the size of the file
    with _reading(path), safe_open(path, framework="pt") as file:
        return set(file.keys())


def _check_training_state(folder: Path) -> None:
    """Optimizer, scheduler and random states are there together or, with `save_only_model`, not at all."""
    random_states = {path.name for path in folder.glob("rng_state*.pth")}
    others = {name for name in ("optimizer.pt", "scheduler.pt", "scaler.pt") if (folder / name).exists()}
    if random_states or others:
        processes = [int(name[10:-4]) for name in random_states if re.fullmatch(r"rng_state_\d+\.pth", name)]
        expected = {"optimizer.pt", "scheduler.pt"}
        # those of a node are numbered without gaps, but need not begin at 0
        numbers = range(min(processes), max(processes)) if processes else ()
        expected |= {f"rng_state_{number}.pth" for number in numbers} if processes else {"rng_state.pth"}
        if absent := sorted(expected - random_states - others):
            raise CheckpointDamage(f"{' and '.join(absent)} missing")
    arguments = {"training_args.bin"} if (folder / "training_args.bin").exists() else set()
    for name in sorted(random_states | others | arguments):
        _check_archive(folder / name)


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
    """Turn into damage whatever a reader makes of bytes that are not what they should be, but no error of the system."""
    _existing(path)
    try:
        yield
    except Exception as error:
        # without a number, or for a position before the file, it is the bytes
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise CheckpointDamage(f"{path.name} cannot be read ({error})") from error


def _existing(path: Path) -> Path:
    """`path` if it is a file. Reads from it, as some readers hide why they could not."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # nor is a name with a null byte any
        is_file = False
    if not is_file:
        raise CheckpointDamage(f"{path.name} is missing")
    with path.open("rb") as file:
        file.read(1)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk and not only in memory."""
    # Windows flushes only what is open for writing
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # there is no such call
        return
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        _warn_of_no_flush(error.strerror)


@cache
def _warn_of_no_flush(reason: str) -> None:
    """Warn once in a process."""
    logger.warning(
        f"The file system does not flush folders ({reason}). If the machine loses power, the newest checkpoint may be "
        "lost: keep more than one."
    )
