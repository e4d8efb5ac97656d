"""trl's trainers train MoCLE unchanged: ids come with the batch by a wrapped collator, or are found in the prompts."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_moe import ClusterIdsCollator, InstructionClusterer, MoCLEConfig, attach_encoder
from peft_moe.tuners.mocle import MoCLELayer
from tiny_models import tiny_llama, tiny_tokenizer


trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


class WordEncoder:
    """Stands for a sentence encoder: the vector of a text is that of its first word."""

    name_or_path = "words"
    embedding_dim = 8

    def encode(self, texts, **_):
        return torch.stack([torch.eye(8)[ord(text[0]) - ord("a")] for text in texts])


CLUSTERER = InstructionClusterer(torch.eye(4, 8), encoder="words")


def build(*, finds_clusters: bool):
    torch.manual_seed(7)
    config = MoCLEConfig.from_clusterer(
        CLUSTERER,
        num_experts=3,
        r=2,
        lora_dropout=0.0,
        temperature=0.3,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(), config)
    if finds_clusters:
        attach_to(model)
    return model


def attach_to(model) -> None:
    from peft_moe.tuners.mocle import attach

    class Encoder(WordEncoder, attach.SentenceEncoder):
        def __init__(self):
            pass

    attach_encoder(model, Encoder(), tokenizer=tiny_tokenizer())


def spy(model) -> list[list[int]]:
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, MoCLELayer))
    layer.register_forward_pre_hook(
        lambda module, args: seen.append(module.scopes["default"].lookup.of_running_pass(module.recorder).ids.tolist())
    )
    return seen


def arguments(cls, folder, **settings):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    defaults |= {"gradient_checkpointing": False}  # which trl turns on, and which would show each batch twice
    return cls(str(folder), **{**defaults, **settings})


def moved_parts(model, before) -> set[str]:
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    return {part for part in ("mocle_A", "mocle_B", "mocle_gate", "mocle_embedding") if any(part in n for n in moved)}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


EVERYTHING = {"mocle_A", "mocle_B", "mocle_gate", "mocle_embedding"}


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_sft_with_ids_in_the_batch(tmp_path, padding_free):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = build(finds_clusters=False)
    before, seen = snapshot(model), spy(model)
    rows = [{"input_ids": list(range(3, 9 + i)), "cluster_ids": i % 4} for i in range(4)]
    args = arguments(
        trl.SFTConfig,
        tmp_path,
        remove_unused_columns=False,
        gradient_accumulation_steps=2,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=ClusterIdsCollator(inner),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert seen == [[0, 1], [2, 3]] * 2
    assert moved_parts(trainer.model, before) == EVERYTHING


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_that_finds_the_clusters(tmp_path, packing):
    model = build(finds_clusters=True)
    before, seen = snapshot(model), spy(model)
    rows = [{"prompt": f"{letter} w1 w2 w3", "completion": " w4 w5"} for letter in "cadb"]
    args = arguments(trl.SFTConfig, tmp_path, packing=packing, max_length=16 if packing else 64)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert moved_parts(trainer.model, before) == EVERYTHING
    if packing:
        assert len(seen[0]) > 2 and sorted(seen[0]) == [0, 1, 2, 3]
    else:
        assert seen == [[2, 0], [3, 1]]


def test_dpo_finds_the_clusters_for_the_model_and_its_reference(tmp_path):
    model = build(finds_clusters=True)
    before, seen = snapshot(model), spy(model)
    rows = [{"prompt": f"{letter} w1 w2", "chosen": " w3 w4", "rejected": " w5"} for letter in "cadb"]
    args = arguments(trl.DPOConfig, tmp_path)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert len(reference) == len(before)
    attach_to(trainer.model)  # the reference adapter came later
    trainer.train()
    assert moved_parts(trainer.model, before) == EVERYTHING
    assert all(torch.equal(dict(trainer.model.named_parameters())[n], p) for n, p in reference.items())
    assert seen[0] == [2, 0, 2, 0]


def test_grpo_finds_the_clusters_in_generation_and_training(tmp_path):
    model = build(finds_clusters=True)
    before, seen = snapshot(model), spy(model)
    args = arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=4)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": f"{letter} w1 w2"} for letter in "cadb"]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert moved_parts(trainer.model, before) & {"mocle_B", "mocle_gate"}
    assert all(len(set(ids)) == 1 for ids in seen)  # two answers to one prompt at a time
