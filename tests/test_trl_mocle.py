"""trl's trainers train MoCLE unchanged: ids come with the batch by a wrapped collator, or are found in the prompts."""

from __future__ import annotations

import itertools
from typing import NamedTuple

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


def build():
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
    return get_peft_model(tiny_llama(), config)


def attach_to(model) -> list[str]:
    """Attach the encoder; returns the texts that it will have encoded."""
    from peft_moe.tuners.mocle.encoder import SentenceEncoder

    encoded = []

    class Encoder(WordEncoder, SentenceEncoder):
        def __init__(self):
            pass

        def encode(self, texts, **_):
            encoded.extend(texts)
            return super().encode(texts)

    attach_encoder(model, Encoder(), tokenizer=tiny_tokenizer())
    return encoded


class Call(NamedTuple):
    """One pass of the first layer."""

    adapter: str
    ids: list[int]
    prompts: list[int]
    """the cluster that the first word of each row names; of a decoded token it says nothing"""
    has_gradient: bool


def spy(model) -> list[Call]:
    """What each active adapter sees."""
    seen = []

    def look(layer, args):
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            ids = layer.scopes[adapter].lookup.of_running_pass(layer.recorder.context).ids.tolist()
            first_words = (
                layer.recorder.context.find_pass().inputs["input_ids"][:, 0] - tiny_tokenizer()("a")["input_ids"][0]
            )
            seen.append(Call(adapter, ids, first_words.tolist(), torch.is_grad_enabled()))

    next(module for module in model.modules() if isinstance(module, MoCLELayer)).register_forward_pre_hook(look)
    return seen


def ids_of(seen: list[Call], adapter: str = "default") -> list[list[int]]:
    return [call.ids for call in seen if call.adapter == adapter]


def arguments(cls, folder, **settings):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    return cls(str(folder), **{**defaults, **settings})


def moved_parts(model, before) -> set[str]:
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    return {part for part in ("mocle_A", "mocle_B", "mocle_gate", "mocle_embedding") if any(part in n for n in moved)}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


WITHOUT_ANSWERS = ["a w1 w2", "b w1 w2", "c w1 w2", "d w1 w2"]
EVERYTHING = {"mocle_A", "mocle_B", "mocle_gate", "mocle_embedding"}


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_sft_with_ids_in_the_batch(tmp_path, padding_free):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = build()
    before, seen = snapshot(model), spy(model)
    rows = [{"input_ids": list(range(3, 9 + i)), "cluster_ids": i % 4} for i in range(4)]
    args = arguments(
        trl.SFTConfig,
        tmp_path,
        remove_unused_columns=False,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
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
    assert ids_of(seen) == [[0, 1], [2, 3]] * 2
    assert moved_parts(trainer.model, before) == EVERYTHING


@pytest.mark.parametrize("layout", ["padded", "padding_free", "packing"])
def test_sft_that_finds_the_clusters(tmp_path, layout):
    model = build()
    before, seen, encoded = snapshot(model), spy(model), attach_to(model)
    rows = [{"prompt": f"{letter} w1 w2", "completion": " w4 w5"} for letter in "cadb"]
    settings = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}}
    settings["packing"] = {"packing": True, "max_length": 16}
    args = arguments(trl.SFTConfig, tmp_path, gradient_checkpointing=False, **settings[layout])
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert moved_parts(trainer.model, before) == EVERYTHING
    assert sorted(encoded) == WITHOUT_ANSWERS
    if layout == "packing":
        assert len(seen[0].ids) > 2 and sorted(seen[0].ids) == [0, 1, 2, 3]
    else:
        assert ids_of(seen) == [[2, 0], [3, 1]]


def test_dpo_finds_the_clusters_for_the_model_and_its_reference(tmp_path):
    model = build()
    before, seen, encoded = snapshot(model), spy(model), attach_to(model)
    rows = [{"prompt": f"{letter} w1 w2", "chosen": " w3 w4", "rejected": " w5"} for letter in "cadb"]
    args = arguments(trl.DPOConfig, tmp_path, gradient_accumulation_steps=2)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert len(reference) == len(before)
    trainer.train()
    assert moved_parts(trainer.model, before) == EVERYTHING
    assert all(torch.equal(dict(trainer.model.named_parameters())[n], p) for n, p in reference.items())
    first, second = [2, 0, 2, 0], [3, 1, 3, 1]
    # each pass of the model comes twice: gradient checkpointing, which trl turns on, computes it again
    assert ids_of(seen) == [first, first, second, second] * 2
    assert ids_of(seen, "ref") == [first, second] * 2
    assert sorted(encoded) == WITHOUT_ANSWERS


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no-reference", "reference"])
def test_grpo_finds_the_clusters_in_generation_and_training(tmp_path, beta):
    model = build()
    before, seen, encoded = snapshot(model), spy(model), attach_to(model)
    steps = []

    def reward(prompts, **_):
        steps.append([ord(prompt[0]) - ord("a") for prompt in prompts])
        return [float(i % 2) for i in range(len(prompts))]

    settings = {"num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2, "beta": beta}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments(trl.GRPOConfig, tmp_path, **settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"{letter} w1 w2"} for letter in "cadb"]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert moved_parts(trainer.model, before) & {"mocle_B", "mocle_gate"}
    assert sorted(steps[0] + steps[1]) == [0, 0, 1, 1, 2, 2, 3, 3]  # two answers to each prompt
    generated = [call.ids for call in seen if call.adapter == "default" and not call.has_gradient]
    assert [ids for ids, _ in itertools.groupby(generated)] == steps  # each token as its prompt
    trained = [call for call in seen if call.has_gradient]
    assert len(trained) == 8 and trained[::2] == trained[1::2]  # twice for gradient checkpointing
    assert all(call.adapter == "default" and call.ids == call.prompts for call in trained)
    # two micro-batches make a step; trl shuffles their rows
    assert [sorted(trained[i].ids + trained[i + 2].ids) for i in (0, 4)] == [sorted(ids) for ids in steps]
    reference = ids_of(seen, "ref")
    assert [reference[i] + reference[i + 1] for i in range(0, len(reference), 2)] == (steps if beta else [])
    assert sorted(encoded) == WITHOUT_ANSWERS
