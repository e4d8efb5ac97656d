"""Run by the exhaustive tests: every configuration of the tuners, checkpoints, shards, and a Hub that is away."""

from __future__ import annotations

import torch
from hub_training import arguments, case, rows
from huggingface_hub import HfApi
from outcomes import FOLDER, error_of, expect, fail_next, finish
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from conformance.tuner_cases import CASES
from models.tiny_llava import image_batch, tiny_llava
from peft_moe import MoeLlavaForConditionalGeneration


def push_every_case() -> None:
    for one in CASES:
        one.model().push_to_hub(f"someone/base-of-{one.name}")
        base = AutoModelForCausalLM.from_pretrained(f"someone/base-of-{one.name}")
        model = get_peft_model(base, one.config()).eval()
        expect(one.name, model, one.batch())
        model.push_to_hub(f"someone/{one.name}")


def train_with_checkpoints() -> None:
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(f"someone/base-of-{case().name}"), case().config())
    settings = arguments(
        FOLDER / "trained",
        push_to_hub=True,
        hub_model_id="someone/checkpoints",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    trainer = Trainer(model, settings, train_dataset=rows())
    trainer.train()
    trainer.push_to_hub()
    expect("checkpoints", model, case().batch())


def push_shards() -> None:
    model = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), expert_noise=1.0).eval()
    model.save_pretrained(FOLDER / "shards", max_shard_size="100KB")
    expect("shards", type(model).from_pretrained(FOLDER / "shards"), image_batch())
    model.push_to_hub("someone/shards", max_shard_size="100KB")


def push_to_a_hub_that_stays_away() -> dict:
    base = case().model()
    torch.manual_seed(11)  # weights that are not on the server, which would not ask for them again
    model = get_peft_model(base, case().config())
    HfApi().create_repo("someone/away")
    before = HfApi().model_info("someone/away").sha
    fail_next("PUT", "/lfs/.*", 503, times=100)
    error = error_of(lambda: model.push_to_hub("someone/away"))
    return {"error": error, "moved": HfApi().model_info("someone/away").sha != before}


def main() -> None:
    torch.set_num_threads(1)
    push_every_case()
    train_with_checkpoints()
    push_shards()
    finish({"away": push_to_a_hub_that_stays_away()})


main()
