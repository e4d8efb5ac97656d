"""Base models that transformers shares out while it loads: what trains as in one process, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from launching import launch
from parallel_cases import mole

from models.tiny_llava import tiny_llava
from peft_moe import MoeLlavaForConditionalGeneration
from tiny_models import tiny_llama, token_batch
from tiny_moe import BY_NAME


pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
        reason="older versions of transformers spell the parallel layout differently",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_base")
    MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), expert_noise=1.0).save_pretrained(folder / "moe_llava")
    tiny_llama().save_pretrained(folder / "llama")
    BY_NAME["mixtral"].build().save_pretrained(folder / "mixtral")
    return folder


@pytest.fixture(scope="module")
def ranks(models):
    return launch(Path(__file__).parent / "train_shared_base.py", models, 2)


def assert_equal(found: dict, single: dict) -> None:
    assert found["losses"] == pytest.approx(single["losses"], abs=1e-5)
    assert single["losses"][0] - single["losses"][1] > 1e-3
    assert found["weights"].keys() == single["weights"].keys()
    for name, weight in single["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_moe_llava_trains_with_experts_spread_over_ranks(ranks, models):
    from train_shared_base import picture_batch, train

    single = train(MoeLlavaForConditionalGeneration.from_pretrained(models / "moe_llava"), picture_batch())
    for found in ranks:
        assert found["ep-moe_llava"]["local"] == {"gate_up_proj": [2, 96, 32], "down_proj": [2, 32, 48]}
        assert_equal(found["ep-moe_llava"], single)


def test_mole_trains_beside_what_tensor_parallelism_splits(ranks):
    from train_shared_base import train

    single = train(mole(lora_target_modules=None), token_batch())
    for found in ranks:
        assert found["tp-mole"]["num_split"] >= 12
        assert_equal(found["tp-mole"], single)


@pytest.mark.parametrize("name", ["tp-mole-split", "tp-mocle-split"])
def test_linears_that_tensor_parallelism_splits_are_refused(ranks, name):
    for found in ranks:
        assert "split over processes by tensor parallelism" in found[name] and "exclude_modules" in found[name]


@pytest.mark.parametrize("name", ["ep-moextend", "fsdp-moextend"])
def test_new_experts_for_a_base_that_is_spread_already_are_refused(ranks, name):
    for found in ranks:
        assert "is spread over processes" in found[name] and "Load the base model whole" in found[name]
