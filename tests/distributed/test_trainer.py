"""The `Trainer` under DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3 and transformers' own FSDP: as in one process.

The configurations are those of `examples/accelerate_configs`.
"""

from __future__ import annotations

import json
from pathlib import Path

import parallel_cases
import pytest
import torch
import train_trainer
from fetch_deepspeed import deepspeed_packages
from launching import launch
from parallel_cases import rows
from peft import PeftModel

from aux_by_hand import aux_by_hand
from peft_moe import MoeLlavaForConditionalGeneration
from tiny_models import tiny_llama
from tiny_moe import BY_NAME


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "train_trainer.py"
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
NAMES = ("mole", "mole-task-only", "mocle", "moextend", "moextend-task-only")
SHARING = {"zero2": "ZeRO-2", "zero3": "ZeRO-3 partitioned"}


def launch_zero(folder: Path, stage: str, *names: str) -> list[dict]:
    try:
        packages = deepspeed_packages()
    except RuntimeError as error:
        pytest.skip(str(error))
    options = json.dumps({"accumulation": 2, "resumes": True})
    return launch(SCRIPT, folder, 2, options, *names, paths=[packages], accelerate=CONFIGS / f"{stage}.yaml")


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def assert_as_in_one_process(found: dict, folder: Path, name: str, **options) -> None:
    single = train_trainer.run(folder, name, {"accumulation": 4, **options})
    assert single["processes"] == 1 and found["processes"] == 2
    moved = (flat(single["weights"]) - flat(single["before"])).norm()
    assert moved > 1e-3
    assert (flat(found["weights"]) - flat(single["weights"])).norm() < 1e-5 * moved
    assert found["losses"] == pytest.approx(single["losses"], abs=1e-5)


def ratio_of_aux_loss(found: dict, task_only: dict, name: str) -> float:
    """Gradient of the auxiliary loss in the first step over the one computed by hand, in norm."""
    step = [(run["before"], run["first"]) for run in (found, task_only)]
    with_aux, without = (flat(before) - flat(after) for before, after in step)
    effect = (with_aux - without) / 0.1
    model = getattr(parallel_cases, name)(0.0).train()
    batches = [{key: value[None] for key, value in row.items()} for row in rows(name, 4)]
    labels = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in batches])
    total = sum(share * aux_by_hand(model, batch) for share, batch in zip(labels / labels.sum(), batches, strict=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)
    expected = flat(dict(zip(trained, gradients, strict=True)))
    assert torch.nn.functional.cosine_similarity(effect, expected, dim=0) == pytest.approx(1.0, abs=1e-4)
    return (effect.norm() / expected.norm()).item()


def assert_saved_weights_are_whole(found: dict, folder: Path, name: str) -> None:
    checkpoint = folder / name / "checkpoint-2"
    if name.startswith("moe_llava"):
        model = MoeLlavaForConditionalGeneration.from_pretrained(checkpoint)
    else:
        base = BY_NAME["mixtral"].build() if name == "moextend" else tiny_llama()
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    loaded = dict(model.named_parameters())
    assert found["weights"].keys() <= loaded.keys()
    assert all(torch.equal(loaded[key], weight) for key, weight in found["weights"].items())


def arguments_of(checkpointing: str, find_unused: bool | None) -> dict:
    kwargs = {"use_reentrant": checkpointing == "reentrant"}
    turned_on = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    return {"ddp_find_unused_parameters": find_unused, **(turned_on if checkpointing != "none" else {})}


@pytest.mark.parametrize(
    ("checkpointing", "find_unused", "names"),
    [
        ("none", None, ["mole-by-sample"]),
        # what `test_wrapped.py` shows too, without a `Trainer`
        pytest.param("non_reentrant", None, ["mole", "mocle", "moextend"], marks=pytest.mark.exhaustive),
        pytest.param("reentrant", False, ["mole", "mocle-table-per-layer", "moextend"], marks=pytest.mark.exhaustive),
    ],
)
def test_ddp_trains_like_one_process(tmp_path, checkpointing, find_unused, names):
    arguments = arguments_of(checkpointing, find_unused)
    options = json.dumps({"accumulation": 2, "arguments": arguments})
    found, other = launch(SCRIPT, tmp_path / "two", 2, options, *names)
    for name in names:
        assert found[name]["sharing"] == "DistributedDataParallel"
        assert torch.equal(flat(found[name]["weights"]), flat(other[name]["weights"]))
        assert_as_in_one_process(found[name], tmp_path / "one", name, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "find_unused", "way_out"),
    [("mole", True, "ddp_find_unused_parameters=False"), ("mocle", False, "cluster_embedding_scope='layer'")],
)
def test_reentrant_checkpointing_that_ddp_cannot_bear_is_refused(tmp_path, name, find_unused, way_out):
    options = json.dumps({"accumulation": 1, "arguments": arguments_of("reentrant", find_unused)})
    for found in launch(SCRIPT, tmp_path, 2, options, name):
        assert "use_reentrant" in found[name]["error"] and way_out in found[name]["error"]


def test_zero3_trains_mole_like_one_process_and_resumes(tmp_path):
    first, second = launch_zero(tmp_path / "two", "zero3", "mole", "mole-task-only")
    for found in (first["mole"], second["mole"]):
        assert found["sharing"] == "ZeRO-3 partitioned"
        assert torch.equal(flat(found["weights"]), flat(found["resumed"]))
    assert torch.equal(flat(first["mole"]["weights"]), flat(second["mole"]["weights"]))
    assert_as_in_one_process(first["mole"], tmp_path / "one", "mole")
    assert ratio_of_aux_loss(first["mole"], first["mole-task-only"], "mole") == pytest.approx(1.0, abs=1e-2)
    assert_saved_weights_are_whole(first["mole"], tmp_path / "two", "mole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", SHARING)
def test_zero_trains_every_method_like_one_process_and_resumes(tmp_path, stage):
    found, _ = launch_zero(tmp_path / "two", stage, *NAMES)
    for name in ("mole", "mocle", "moextend"):
        assert found[name]["sharing"] == SHARING[stage]
        assert torch.equal(flat(found[name]["weights"]), flat(found[name]["resumed"]))
        assert_as_in_one_process(found[name], tmp_path / "one", name)
        assert_saved_weights_are_whole(found[name], tmp_path / "two", name)
    assert ratio_of_aux_loss(found["mole"], found["mole-task-only"], "mole") == pytest.approx(1.0, abs=1e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", SHARING)
def test_zero_trains_moe_llava_like_one_process_and_resumes(tmp_path, stage):
    found = launch_zero(tmp_path / "two", stage, "moe_llava")[0]["moe_llava"]
    assert found["sharing"] == SHARING[stage]
    assert torch.equal(flat(found["weights"]), flat(found["resumed"]))
    assert_as_in_one_process(found, tmp_path / "one", "moe_llava")
    assert_saved_weights_are_whole(found, tmp_path / "two", "moe_llava")


@pytest.mark.exhaustive
@pytest.mark.parametrize("ram_efficient", ["false", "true"])
def test_fsdp2_by_accelerate_trains_like_one_process_and_resumes(tmp_path, ram_efficient):
    # SGD has no state, and torch then cannot tell the device when it loads the optimizer
    options = {"accumulation": 2, "optim": "adamw_torch", "resumes": True}
    options["fsdp2"] = {"FSDP_CPU_RAM_EFFICIENT_LOADING": ram_efficient}
    names = ("mole", "mole-on-bf16", "mocle", "moextend", "moe_llava-frozen-tower")
    found, other = launch(SCRIPT, tmp_path / "two", 2, json.dumps(options), *names, accelerate=CONFIGS / "fsdp2.yaml")
    for name in names:
        assert found[name]["sharing"].startswith("FSDP") and found[name]["sharing"].endswith("of DTensor")
        assert torch.equal(flat(found[name]["weights"]), flat(other[name]["weights"]))
        assert torch.equal(flat(found[name]["weights"]), flat(found[name]["resumed"]))
        assert_as_in_one_process(found[name], tmp_path / "one", name, optim="adamw_torch")
        assert_saved_weights_are_whole(found[name], tmp_path / "two", name)


@pytest.mark.exhaustive
def test_accelerate_takes_ddp_for_fsdp_on_a_cpu(tmp_path):
    options = {"accumulation": 2, "steps": 1}
    found, _ = launch(SCRIPT, tmp_path, 2, json.dumps(options), "mole", accelerate=CONFIGS / "fsdp2.yaml")
    assert found["mole"]["sharing"] == "DistributedDataParallel"


@pytest.mark.exhaustive
def test_ddp_by_accelerate_trains_like_one_process_with_a_smaller_last_batch(tmp_path):
    options = {"accumulation": 1, "batch_size": 2, "rows": 7}
    names = ("mole", "mocle", "moextend", "moe_llava")
    found, _ = launch(SCRIPT, tmp_path / "two", 2, json.dumps(options), *names, accelerate=CONFIGS / "ddp.yaml")
    for name in names:
        assert found[name]["sharing"] == "DistributedDataParallel"
        assert_as_in_one_process(found[name], tmp_path / "one", name, **{**options, "accumulation": 2})


@pytest.mark.exhaustive
def test_fsdp_of_transformers_trains_like_one_process(tmp_path):
    bases = {"mole": tiny_llama(), "mocle": tiny_llama(), "moe_llava": parallel_cases.moe_llava()}
    for name, base in bases.items():
        base.save_pretrained(tmp_path / "base" / name)
    options = {"accumulation": 2, "base": str(tmp_path / "base"), "layout": {"fsdp_size": 2}}
    found, _ = launch(SCRIPT, tmp_path / "two", 2, json.dumps(options), *bases)
    for name in bases:
        assert found[name]["sharing"].endswith("of DTensor")
        assert_as_in_one_process(found[name], tmp_path / "one", name)
