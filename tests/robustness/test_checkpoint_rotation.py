"""The callback deletes old checkpoints when the new one is safe, and never what may be the only good one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from trained import checkpoints, trainer

from peft_moe import IntactCheckpointCallback, find_intact_checkpoint
from peft_moe.checkpoints import MANIFEST_FILE


# the metric is such that the best is the untrained one
FIRST_IS_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    trainer(folder, IntactCheckpointCallback()).train()
    return folder


@pytest.fixture
def output_dir(trained, tmp_path) -> Path:
    """With the checkpoints of steps 2 and 4, which have manifests."""
    return Path(shutil.copytree(trained, tmp_path / "output"))


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_the_callback_keeps_the_newest(limit, kept, tmp_path):
    trainer(tmp_path, IntactCheckpointCallback(save_total_limit=limit), max_steps=6).train()
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_the_callback_keeps_the_best(tmp_path):
    first = trainer(tmp_path / "first", IntactCheckpointCallback(save_total_limit=1), **FIRST_IS_BEST, max_steps=6)
    first.train()
    assert first.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-2")
    assert checkpoints(tmp_path / "first") == ["checkpoint-2", "checkpoint-6"]
    # in another folder it takes no place of those to keep
    second = trainer(tmp_path / "second", IntactCheckpointCallback(save_total_limit=2), **FIRST_IS_BEST, max_steps=10)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-6"))
    assert second.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-2")
    assert checkpoints(tmp_path / "second") == ["checkpoint-10", "checkpoint-8"]


def test_what_a_killed_run_has_left_goes_first(output_dir):
    shutil.copytree(output_dir / "checkpoint-4", output_dir / "checkpoint-8")
    (output_dir / "checkpoint-8" / MANIFEST_FILE).unlink()
    (output_dir / "checkpoint-8" / "trainer_state.json").unlink()
    resumed = trainer(output_dir, IntactCheckpointCallback(save_total_limit=2), max_steps=6)
    resumed.train(resume_from_checkpoint=find_intact_checkpoint(output_dir))
    assert checkpoints(output_dir) == ["checkpoint-4", "checkpoint-6"]


def test_what_is_damaged_goes_before_what_is_older(output_dir):
    path = output_dir / "checkpoint-4" / "optimizer.pt"
    os.truncate(path, path.stat().st_size - 1)
    trainer(output_dir, IntactCheckpointCallback(save_total_limit=2), max_steps=5, save_steps=5).train()
    assert checkpoints(output_dir) == ["checkpoint-2", "checkpoint-5"]


def test_later_steps_stay_until_training_gets_there(output_dir):
    later = Path(shutil.move(output_dir / "checkpoint-4", output_dir / "checkpoint-8"))
    (later / MANIFEST_FILE).unlink()
    trainer(output_dir, IntactCheckpointCallback(save_total_limit=1), max_steps=6).train()
    assert checkpoints(output_dir) == ["checkpoint-6", "checkpoint-8"]
    resumed = trainer(output_dir, IntactCheckpointCallback(save_total_limit=1), max_steps=10)
    resumed.train(resume_from_checkpoint=str(output_dir / "checkpoint-6"))
    assert checkpoints(output_dir) == ["checkpoint-10"]


def test_what_a_link_leads_to_is_not_touched(trained, output_dir):
    elsewhere = Path(shutil.move(output_dir / "checkpoint-2", output_dir.parent / "elsewhere"))
    (output_dir / "checkpoint-1").symlink_to(elsewhere)
    trainer(output_dir, IntactCheckpointCallback(save_total_limit=1)).train()
    assert checkpoints(output_dir) == ["checkpoint-1", "checkpoint-4"]
    assert (output_dir / "checkpoint-1").is_symlink()
    names = {path.name for path in (trained / "checkpoint-2").iterdir()}
    assert {path.name for path in elsewhere.iterdir()} == names


def test_what_cannot_be_deleted_does_not_end_training(output_dir, caplog):
    # no file, so that the system refuses to delete it as one
    (output_dir / "checkpoint-1" / "trainer_state.json").mkdir(parents=True)
    trainer(output_dir, IntactCheckpointCallback(save_total_limit=1)).train()
    assert checkpoints(output_dir) == ["checkpoint-1", "checkpoint-4"]
    assert f"Could not delete the old checkpoint '{output_dir / 'checkpoint-1'}': " in caplog.text


def test_a_limit_of_the_trainer_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"save_total_limit=3, which deletes.*IntactCheckpointCallback\(save_total_li"
    ):
        trainer(tmp_path, IntactCheckpointCallback(), save_total_limit=3).train()
    with pytest.raises(ValueError, match="save_total_limit must be at least 1, or None to keep all, but is 0"):
        IntactCheckpointCallback(save_total_limit=0)


def test_a_hyperparameter_search_is_refused(tmp_path):
    searched = trainer(tmp_path, IntactCheckpointCallback())
    control, state = searched.control, searched.state
    state.is_hyper_param_search = True
    with pytest.raises(ValueError, match="does not know the folders of a hyperparameter search"):
        searched.callback_handler.on_train_begin(searched.args, state, control)


def test_a_trainer_that_saves_without_telling_is_refused(tmp_path):
    training = trainer(tmp_path, IntactCheckpointCallback())
    training.args.enable_jit_checkpoint = True  # as an argument, it would handle SIGTERM in this process from now on
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True, which saves without telling callbacks"):
        training.train()
