"""`ExpertLoadCallback` counts what a mixture of experts without adapter routes in training, and ends with its trainer."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from models.tiny_llava import image_batch, labels_of, tiny_llava
from peft_moe import MoeTuningStage
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.monitoring import ExpertLoad, ExpertLoadCallback, record_expert_load
from peft_moe.routing_recorder import get_recorder
from tiny_models import token_batch
from tiny_moe import BY_NAME, moe_batch


def sparse_llava() -> MoeLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), expert_noise=1.0, moe_layers="all").eval()


def train(model, folder, callback, rows, **arguments) -> Trainer:
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    common = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings, **common, **arguments),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["mixtral", "moe_llava"])
def test_the_callback_logs_a_model_without_adapter(tmp_path, name, checkpointing):
    if name == "mixtral":
        model, batch = BY_NAME["mixtral"].build().requires_grad_(True), moe_batch(8)
    else:
        model, batch = sparse_llava(), image_batch(8)
        batch["labels"] = labels_of(batch)
        MoeTuningStage("III").apply(model)
    rows = [{key: tensor[index] for key, tensor in batch.items()} for index in range(8)]
    callback = ExpertLoadCallback()
    trainer = train(model, tmp_path, callback, rows, gradient_checkpointing=checkpointing)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert 0 < entry["expert_load_entropy"] <= 1
        assert {"expert_load_max_share", "dead_experts"} <= entry.keys()
    num_tokens = 8 * batch["input_ids"].shape[1]
    assert [sum(counts) for counts in callback.train_load.by_router().values()] == [2 * num_tokens] * 3
    table = json.loads((tmp_path / "expert_load.json").read_text())
    assert ExpertLoad.from_dict(table["train"]).by_router() == callback.train_load.by_router()
    assert callback.train_load.token_groups == (["text", "image"] if name == "moe_llava" else ["all"])
    del trainer, callback
    gc.collect()
    assert get_recorder(model) is None


def test_a_trained_model_forgets_its_callback(tmp_path):
    """The callback ends with its trainer; the next one counts from its own start."""
    model = BY_NAME["mixtral"].build().requires_grad_(True)
    rows = [{key: tensor[0] for key, tensor in moe_batch(1, seed=seed).items()} for seed in range(4)]
    for _ in range(2):
        callback = ExpertLoadCallback(file_name=None)
        trainer = train(model, tmp_path, callback, rows)
        assert [sum(counts) for counts in callback.train_load.by_router().values()] == [2 * 4 * 2 * 8] * 3
        del trainer, callback
        gc.collect()
    with torch.no_grad(), record_expert_load(model) as load:
        model(**token_batch(num_padding=0))
    assert [sum(counts) for counts in load.by_router().values()] == [2 * 24] * 3
    assert get_recorder(model) is None


def test_a_callback_of_a_second_trainer_outlives_the_first(tmp_path):
    model = BY_NAME["mixtral"].build().requires_grad_(True)
    rows = [{key: tensor[0] for key, tensor in moe_batch(1, seed=seed).items()} for seed in range(4)]
    first = train(model, tmp_path, ExpertLoadCallback(file_name=None), rows)
    callback = ExpertLoadCallback(file_name=None)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    second = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    del first
    gc.collect()
    second.train()
    assert all(sum(counts) > 0 for counts in callback.train_load.by_router().values())
    assert len(callback.train_load.by_router()) == 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_does_not_count_with_any_cache(cache):
    model = BY_NAME["mixtral"].build()
    batch = token_batch(num_padding=3)
    batch = {
        name: batch[name].flip(1) if name == "attention_mask" else batch[name]
        for name in ("input_ids", "attention_mask")
    }
    num_new = 3
    with torch.no_grad(), record_expert_load(model) as load:
        model.generate(
            **batch, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, cache_implementation=cache
        )
    num_tokens = int(batch["attention_mask"].sum()) + (num_new - 1) * len(batch["input_ids"])
    assert [sum(counts) for counts in load.by_router().values()] == [2 * num_tokens] * 3


@pytest.mark.parametrize("how", ["wrapped", pytest.param("in place", marks=pytest.mark.slow)])
def test_a_compiled_model_is_recorded_every_time(how):
    torch._dynamo.reset()
    model = BY_NAME["mixtral"].build()
    batch = {name: tensor for name, tensor in moe_batch().items() if name != "labels"}
    with torch.no_grad(), record_expert_load(model) as expected:
        model(**batch)
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    for _ in range(2):
        with torch.no_grad():
            compiled(**batch)
            with record_expert_load(compiled) as load:
                compiled(**batch)
        assert load.by_router() == expected.by_router()


def test_a_copy_made_while_recording_is_not_recorded():
    model = BY_NAME["mixtral"].build()
    batch = moe_batch()
    with torch.no_grad(), record_expert_load(model) as load:
        copied = copy.deepcopy(model)
        copied(**batch)
        assert not load.counts
    with torch.no_grad(), record_expert_load(copied) as load:
        copied(**batch)
    assert [sum(counts) for counts in load.by_router().values()] == [2 * batch["input_ids"].numel()] * 3
    assert get_recorder(copied) is None
