"""`ExpertLoadCallback` under an unchanged `Trainer`: exact counts, keys in every reporter, one warning, one file."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref

import pytest
import torch
from monitored import HandCount, build, rows, trainer_for
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from peft_moe import get_aux_loss
from peft_moe.monitoring import ExpertLoad, ExpertLoadCallback
from peft_moe.routing_recorder import get_recorder
from tiny_models import tiny_llama, token_batch


KEYS = {"aux_loss", "expert_load_entropy", "expert_load_max_share", "dead_experts"}


class Reporter(TrainerCallback):
    """Keeps what a reporter (TensorBoard, Weights & Biases, ...) would send away when `on_log` is called."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


def watched():
    model = build()
    return ExpertLoadCallback(), model, HandCount(model)


def read(path):
    return json.loads((path / "expert_load.json").read_text())


def test_counts_of_training_equal_those_of_hooks(tmp_path):
    callback, model, hand = watched()
    trainer_for(model, tmp_path, [callback], max_steps=3).train()
    assert callback.train_load.by_router() == hand.counts["train"]
    assert ExpertLoad.from_dict(read(tmp_path)["train"]).split() == {"train": hand.counts["train"]}


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 3},
    ],
    ids=["accumulation", "non-reentrant", "reentrant", "accumulation-checkpointing"],
)
def test_accumulation_and_checkpointing_do_not_change_the_counts(tmp_path, arguments):
    """The hand count needs a run without checkpointing; both runs see the same rows and the same weights."""
    counts = []
    for checkpointing in (False, True):
        callback, model, hand = watched()
        own = arguments if checkpointing else {k: v for k, v in arguments.items() if "checkpointing" not in k}
        trainer_for(model, tmp_path, [callback], **own).train()
        counts.append(callback.train_load.by_router())
        if not checkpointing:
            assert counts[0] == hand.counts["train"]
    assert counts[0] == counts[1]


def test_every_reporter_and_the_history_see_the_keys(tmp_path):
    before, after = Reporter(), Reporter()
    trainer = trainer_for(build(), tmp_path, [before, ExpertLoadCallback(), after])
    trainer.train()
    for sent in (before.sent, after.sent, trainer.state.log_history):
        logs = [entry for entry in sent if "loss" in entry]
        assert len(logs) == 2
        assert all(entry.keys() >= KEYS for entry in logs)
        assert not any(entry.keys() & KEYS for entry in sent if "loss" not in entry)
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_callback_that_is_added_later_comes_first_too_and_logs_the_loss_that_there_is(tmp_path, coef):
    reporter = Reporter()
    trainer = trainer_for(build(router_aux_loss_coef=coef), tmp_path, [reporter])
    trainer.add_callback(ExpertLoadCallback())
    trainer.train()
    assert reporter.sent[0].keys() & KEYS == (KEYS if coef else KEYS - {"aux_loss"})


def test_every_other_callback_is_called_once_per_event(tmp_path):
    class Counter(TrainerCallback):
        def __init__(self):
            self.begun = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun += 1

    class OtherCounter(Counter):
        pass

    before, after = Counter(), OtherCounter()
    trainer_for(build(), tmp_path, [before, ExpertLoadCallback(), after], max_steps=1).train()
    assert (before.begun, after.begun) == (1, 1)


def test_logged_numbers_describe_the_steps_since_the_last_log(tmp_path):
    model = build()
    hand, values, reporter = HandCount(model), [], Reporter()

    class ByHand(TrainerCallback):
        """Reads the auxiliary loss of each micro-batch, and the counts of each log."""

        def __init__(self):
            self.counts = []

        def read(self, args, state, control, **kwargs):
            with torch.no_grad():
                values.append(get_aux_loss(model).item())

        on_substep_end = on_step_end = read

        def on_log(self, args, state, control, **kwargs):
            self.counts.append(copy.deepcopy(hand.counts["train"]))

    by_hand = ByHand()
    trainer_for(
        model, tmp_path, [by_hand, ExpertLoadCallback(), reporter], gradient_accumulation_steps=2, num_rows=32
    ).train()
    first, second = (entry for entry in reporter.sent if "loss" in entry)
    assert len(values) == 8
    assert first["aux_loss"] == pytest.approx(sum(values[:4]) / 4, rel=1e-5)
    assert second["aux_loss"] == pytest.approx(sum(values[4:]) / 4, rel=1e-5)
    window = {
        router: [b - a for a, b in zip(by_hand.counts[0][router], counts, strict=True)]
        for router, counts in by_hand.counts[1].items()
    }
    assert second["expert_load_max_share"] == max(max(counts) / sum(counts) for counts in window.values())


def test_training_is_the_same_with_and_without(tmp_path):
    losses = []
    for callbacks in ([], [ExpertLoadCallback()]):
        trainer = trainer_for(build(), tmp_path, callbacks)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_each_data_set_is_a_domain(tmp_path):
    data = {"chess": rows(5, seed=1), "train": rows(4, seed=2)}
    (callback, model, hand), reporter = watched(), Reporter()
    trainer = trainer_for(
        model, tmp_path, [callback, reporter], eval_dataset=data, eval_strategy="steps", eval_steps=2, max_steps=4
    )
    trainer.train()
    assert callback.train_load.by_router() == hand.counts["train"]
    hand.counts["eval"].clear()
    metrics = trainer.evaluate()
    assert callback.eval_load.domains == ["chess", "train"]
    assert callback.eval_load.by_router() == hand.counts["eval"]
    hand.counts["eval"].clear()
    trainer.evaluate(data["chess"], metric_key_prefix="eval_chess")
    assert callback.eval_load.by_router(domain="chess") == hand.counts["eval"]
    written = read(tmp_path)
    assert written["eval"]["summary"]["chess"]["entropy"] == metrics["eval_chess_expert_load_entropy"]
    assert metrics["eval_train_dead_experts"] == callback.eval_load.summary(domain="train").num_dead_experts
    names = {key for entry in reporter.sent for key in entry}
    assert names >= {f"eval_{d}_{k}" for d in data for k in KEYS - {"aux_loss"}}
    assert ExpertLoad.from_dict(written["train"]).domains == ["train"]


def test_evaluation_and_prediction_without_training(tmp_path):
    callback, model, hand = watched()
    trainer = trainer_for(model, tmp_path, [callback], eval_dataset=rows(5))
    metrics = trainer.evaluate()
    assert callback.eval_load.split() == {"eval": hand.counts["eval"]}
    assert 0 < metrics["eval_expert_load_entropy"] <= 1
    hand.counts["eval"].clear()
    prediction = trainer.predict(rows(3, seed=4))
    assert callback.eval_load.by_router(domain="test") == hand.counts["eval"]
    assert "test_expert_load_max_share" in prediction.metrics
    assert read(tmp_path)["eval"]["summary"].keys() == {"eval", "test"}


def test_generating_samples_in_between_does_not_count(tmp_path):
    callback, model, batch = ExpertLoadCallback(), build(), token_batch()

    class Sampler(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.generate(batch["input_ids"], max_new_tokens=2)

    trainer = trainer_for(
        model, tmp_path, [callback, Sampler()], eval_dataset=rows(4), eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    expected = sum(int(row["attention_mask"].sum()) for row in rows(4))
    assert [sum(counts) for counts in callback.eval_load.by_router().values()] == [expected] * 3
    model.generate(batch["input_ids"], max_new_tokens=2)
    trainer.evaluate()
    assert [sum(counts) for counts in callback.eval_load.by_router().values()] == [expected] * 3


def test_forward_passes_outside_training_do_not_count_as_training(tmp_path):
    callback, model, hand = watched()
    trainer = trainer_for(model, tmp_path, [callback], eval_dataset=rows(4))
    trainer.train()
    expected = copy.deepcopy(hand.counts["train"])
    model.train()
    model(**token_batch()).loss.backward()
    trainer.evaluate()
    assert ExpertLoad.from_dict(read(tmp_path)["train"]).by_router() == expected


def test_evaluation_that_began_unseen_is_not_counted_by_half(tmp_path, caplog):
    trainer = trainer_for(build(), tmp_path, [], eval_dataset=rows(6))
    callback = ExpertLoadCallback()
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
    assert "missed the first batch" in caplog.text
    assert "eval_dead_experts" not in metrics
    assert "eval_dead_experts" in trainer.evaluate()


def collapsed_model():
    model = build(router_aux_loss_coef=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("mole_router.default.bias"):
            parameter.data = torch.tensor([1e4, 0.0, 0.0, 0.0])
    return model


def test_collapse_is_said_once_with_what_to_do(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        trainer_for(collapsed_model(), tmp_path, [ExpertLoadCallback()], max_steps=6, logging_steps=1).train()
    (record,) = (record for record in caplog.records if "collapsed" in record.message)
    assert "at step 3 the load entropy is 0.00" in record.message
    assert "9 of 12 experts are dead" in record.message
    assert "expert 0 of 'model.layers.0.mlp' gets 100%" in record.message
    assert "Raise router_aux_loss_coef" in record.message


@pytest.mark.parametrize(
    ("make", "limits", "logging_steps"),
    # four steps are two logs
    [(build, {"min_entropy": 0.01, "max_dead_fraction": 1.0}, 1), (collapsed_model, {"patience": 3}, 2)],
    ids=["balanced", "not-yet-patience-logs"],
)
def test_no_warning_of_collapse(tmp_path, caplog, make, limits, logging_steps):
    with caplog.at_level(logging.WARNING, logger="peft_moe"):
        trainer_for(make(), tmp_path, [ExpertLoadCallback(**limits)], logging_steps=logging_steps).train()
    assert "collapsed" not in caplog.text


def test_resuming_goes_on_counting(tmp_path):
    whole = ExpertLoadCallback()
    trainer_for(build(), tmp_path / "whole", [whole]).train()
    trainer_for(build(), tmp_path / "parts", [ExpertLoadCallback()], save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "parts" / "checkpoint-2" / "expert_load.json").is_file()
    resumed = ExpertLoadCallback()
    checkpoint = str(tmp_path / "parts" / "checkpoint-2")
    trainer_for(build(), tmp_path / "parts", [resumed]).train(resume_from_checkpoint=checkpoint)
    assert resumed.train_load.by_router() == whole.train_load.by_router()
    assert read(tmp_path / "parts")["train_from_step"] == 0


def test_file_says_where_counting_began(tmp_path):
    trainer_for(build(), tmp_path, [], save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer_for(build(), tmp_path, [ExpertLoadCallback()]).train(resume_from_checkpoint=checkpoint)
    written = read(tmp_path)
    assert (written["train_from_step"], written["step"]) == (2, 4)


def test_training_again_counts_from_zero(tmp_path):
    callback, model, hand = watched()
    trainer = trainer_for(model, tmp_path, [callback])
    trainer.train()
    hand.counts["train"].clear()
    trainer.train()
    assert callback.train_load.by_router() == hand.counts["train"]


def test_no_file_where_none_is_wanted(tmp_path):
    trainer_for(build(), tmp_path, [ExpertLoadCallback(file_name=None)], max_steps=1).train()
    assert not list(tmp_path.glob("**/expert_load*"))


def test_trainer_that_is_gone_leaves_no_listener(tmp_path):
    model = build()
    trainer = trainer_for(model, tmp_path, [ExpertLoadCallback()], max_steps=1)
    trainer.train()
    assert len(get_recorder(model).listeners) == 1
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    assert get_recorder(model).listeners == []


def test_model_without_routers_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router that peft_moe knows"):
        trainer_for(tiny_llama(), tmp_path, [ExpertLoadCallback()]).train()


class _HostReads(TorchDispatchMode):
    """Notes every operation that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.bincount,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_images", [False, True])
def test_counting_never_waits_for_the_device(tmp_path, has_images):
    base_model = tiny_llama()
    if has_images:
        base_model.config.image_token_id = 5
    callback, model = ExpertLoadCallback(), build(base_model).train()
    trainer = trainer_for(model, tmp_path, [callback], max_steps=1)
    trainer.train()
    callback._is_training = True
    found = []

    def count(forward_pass):
        with _HostReads() as reads:
            callback._count(forward_pass)
        found.append(reads.found)

    get_recorder(model).listeners.append(count)
    model(**token_batch())
    assert found == [[]]
    assert callback._window.token_groups == (["text", "image"] if has_images else ["all"])
