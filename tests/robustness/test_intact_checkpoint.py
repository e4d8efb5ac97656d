"""`find_intact_checkpoint` takes what is whole and says what is wrong with the rest."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from trained import Evil, trainer

from peft_moe import ExpertLoadCallback, find_intact_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Output folders with the checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("trained")
    trainer(root / "plain", ExpertLoadCallback()).train()
    trainer(root / "adapters", adapters=("first", "second")).train()
    trainer(root / "full", full=True, save_only_model=True).train()
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def copy(trained, tmp_path):
    """A copy to damage of one of these folders."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(trained[name], tmp_path / name))

    return make


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json"]  # fmt: skip
DAMAGE = {
    "missing": Path.unlink,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    # what a machine that went down can leave: the right size and nothing in it
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    # opening it would wait for ever
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_skipped_and_the_file_named(name, damage, copy, caplog):
    output_dir = copy("plain")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    caplog.clear()
    DAMAGE[damage](output_dir / "checkpoint-4" / name)
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"'{output_dir / 'checkpoint-4'}', which is not whole" in record.getMessage()
    assert name in record.getMessage()


def test_where_nothing_is_whole_there_is_no_checkpoint(copy, tmp_path, caplog):
    assert find_intact_checkpoint(tmp_path / "not made yet") is None
    output_dir = copy("plain")
    for step in (2, 4):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").write_bytes(b"")
    assert find_intact_checkpoint(output_dir) is None
    assert len(caplog.records) == 2


@pytest.mark.parametrize("name", ["global_step4", "pytorch_model_fsdp_0"])
def test_training_does_not_begin_anew_over_what_cannot_be_judged(name, copy, caplog):
    output_dir = copy("plain")
    (output_dir / "checkpoint-4" / name).mkdir()
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert f"{output_dir / 'checkpoint-4'}', which FSDP or DeepSpeed has written" in caplog.text
    (output_dir / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{output_dir / 'checkpoint-4'} cannot be judged")):
        find_intact_checkpoint(output_dir)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="the system has no /proc/self/mem, as a failing disk")
@pytest.mark.parametrize("name", FILES)
def test_an_error_of_the_system_is_no_damage(name, copy):
    path = copy("plain") / "checkpoint-4" / name
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError) as caught:
        find_intact_checkpoint(path.parents[1])
    assert caught.value.errno == errno.EIO


def test_steps_are_compared_as_numbers_and_other_names_are_left_alone(copy):
    output_dir = copy("plain")
    for name, step in (("checkpoint-10", 10), ("checkpoint-99-old", 99)):
        folder = Path(shutil.copytree(output_dir / "checkpoint-4", output_dir / name))
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    (output_dir / "checkpoint-11").write_text("a file")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-10")


def test_states_may_be_those_of_several_processes(copy):
    checkpoint = copy("plain") / "checkpoint-4"
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_9.pth")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_8.pth")
    assert find_intact_checkpoint(checkpoint.parent) == str(checkpoint)


def of_a_bare_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "optimizer.pt", "w") as archive:
        archive.writestr("notes.txt", "no tensors")


NOT_WHOLE = {
    "which is not whole: checkpoint-is-incomplete.txt says so": lambda f: (f / "checkpoint-is-incomplete.txt").touch(),
    "trainer_state.json is of step 2": lambda f: shutil.copy(f.parent / "checkpoint-2" / "trainer_state.json", f),
    "optimizer.pt and scheduler.pt missing": lambda f: [(f / n).unlink() for n in ("optimizer.pt", "scheduler.pt")],
    "adapter_config.json names no peft_type": lambda f: (f / "adapter_config.json").write_text('{"r": 2}'),
    "checkpoint-4 holds no weights, such as adapter_model.safetensors": lambda f: [
        path.unlink() for path in f.glob("adapter_*")
    ],
    "optimizer.pt is no file of torch.save": of_a_bare_archive,
}


@pytest.mark.parametrize("message", NOT_WHOLE)
def test_what_is_no_whole_checkpoint_is_said(message, copy, caplog):
    output_dir = copy("plain")
    NOT_WHOLE[message](output_dir / "checkpoint-4")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert message in caplog.text


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_every_one_of_several_adapters_has_to_be_there(name, copy, caplog):
    output_dir = copy("adapters")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    (output_dir / "checkpoint-4" / "second" / name).unlink()
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert len(caplog.records) == 1


def shard(folder: Path) -> None:
    """Split the weights over two files, as a large model has them."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]), f"{SHARD} cannot be read"),
        (lambda folder: shutil.copy(folder / SHARD.replace("2-of", "1-of"), folder / SHARD), f"{SHARD} lacks"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
            "has no weight_map",
        ),
    ],
    ids=["missing", "cut", "of-other-tensors", "index-of-nothing", "index-of-numbers"],
)
def test_every_shard_of_a_model_has_to_be_there(change, message, copy, caplog):
    output_dir = copy("full")
    shard(output_dir / "checkpoint-4")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    change(output_dir / "checkpoint-4")
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
    assert message in caplog.text


@pytest.mark.parametrize("archived", [True, False], ids=["archive", "bare-pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.bin"])
def test_no_pickle_is_loaded(name, archived, copy, tmp_path):
    output_dir = copy("plain")
    content = io.BytesIO()
    torch.save(Evil(tmp_path / "pwned"), content, _use_new_zipfile_serialization=archived)
    (output_dir / "checkpoint-4" / name).write_bytes(content.getvalue())
    expected = "checkpoint-4" if archived else "checkpoint-2"
    assert find_intact_checkpoint(output_dir) == str(output_dir / expected)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_wrong_byte_in_a_state_is_found_or_harmless_or_refused_by_torch(copy):
    output_dir = copy("plain")
    path = output_dir / "checkpoint-4" / "scheduler.pt"
    good, expected, num_found = path.read_bytes(), torch.load(path), 0
    for position in range(0, len(good), 5):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        if find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-2"):
            num_found += 1
        else:
            try:
                assert torch.load(path) == expected
            except (RuntimeError, ValueError, pickle.UnpicklingError):
                pass  # a part of the header that only torch reads
        path.write_bytes(good)
    assert num_found


def test_training_that_resumes_ends_with_the_same_weights(copy, trained):
    output_dir = copy("plain")
    (output_dir / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer(output_dir, ExpertLoadCallback()).train(resume_from_checkpoint=find_intact_checkpoint(output_dir))
    assert find_intact_checkpoint(output_dir) == str(output_dir / "checkpoint-4")
    name = "checkpoint-4/adapter_model.safetensors"
    found, expected = (safetensors.torch.load_file(folder / name) for folder in (output_dir, trained["plain"]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
