"""DDP and FSDP2 of plain torch: two ranks, or four, train as one process does, and what they save loads in one."""

from __future__ import annotations

from pathlib import Path

import parallel_cases
import pytest
import torch
from launching import launch
from parallel_cases import CASES, checkpoint, joined, steps_of, text_batch, train
from peft import PeftModel

from aux_by_hand import aux_by_hand
from tiny_models import tiny_llama
from tiny_moe import BY_NAME


pytestmark = pytest.mark.slow
SETTINGS = [
    *(f"ddp/{name}/none" for name in ("mole", "mocle", "moextend", "mole-task-only", "moextend-task-only")),
    *(f"ddp/{name}/reentrant" for name in ("mole", "mocle-table-per-layer", "moextend")),
    *(f"ddp-unused/{name}/non_reentrant" for name in ("mole", "mocle", "moextend")),
    *(f"ddp/{name}/none" for name in ("mole-global", "mole-pooled-global", "moextend-global")),
    "ddp/mole-global/reentrant",
    *(f"fsdp/{name}/none" for name in ("mole", "mocle", "moextend", "mole-task-only", "mole-global", "mole-on-bf16")),
    *(f"fsdp/{name}/non_reentrant" for name in ("mole", "mocle", "moextend")),
    *(f"fsdp/{name}/reentrant" for name in ("mole", "mocle", "moextend")),
    "ddp-unused/moe_llava/none",
    "fsdp/moe_llava/none",
]
WITH_FOUR = [
    *(f"ddp/{name}/none" for name in ("mole", "mocle", "moextend", "mole-global")),
    "ddp-unused/moe_llava/none",
    *(f"fsdp/{name}/none" for name in ("mole", "mocle", "moextend", "moe_llava")),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(run_folder):
    return launch(
        Path(__file__).parent / "train_wrapped.py", run_folder, 2, *SETTINGS, "shared-table", "global-corners"
    )


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return launch(Path(__file__).parent / "train_wrapped.py", tmp_path_factory.mktemp("four"), 4, *WITH_FOUR)


def one_process(name: str, checkpointing: str, num_ranks: int) -> dict:
    """The same training without any other process. What is balanced over all ranks is one batch here."""
    case = CASES[name]
    model = case.build()
    checkpoint(model, checkpointing)
    steps = steps_of(case, num_ranks)
    if name.endswith("-global"):
        steps = [[[joined(row)] for row in step] for step in steps]
    return train(model, steps, 1)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def assert_as_in_one_process(ranks: list[dict], setting: str) -> None:
    _, name, checkpointing = setting.split("/")
    first, *others = (rank[setting] for rank in ranks)
    single = one_process(name, checkpointing, len(ranks))
    assert first["weights"].keys() == single["weights"].keys()
    for other in others:
        assert torch.equal(flat(first["weights"]), flat(other["weights"]))
    before = {n: p for n, p in CASES[name].build().named_parameters() if p.requires_grad}
    assert (flat(single["weights"]) - flat(before)).abs().max() > 1e-3
    gradient = flat(single["gradient"])
    assert (flat(first["gradient"]) - gradient).norm() < 1e-5 * gradient.norm()
    torch.testing.assert_close(flat(first["weights"]), flat(single["weights"]), rtol=1e-5, atol=1e-5)
    if not name.endswith("-global"):
        losses = [loss for row in zip(*(rank[setting]["losses"] for rank in ranks), strict=True) for loss in row]
        assert losses == pytest.approx(single["losses"], abs=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_ranks_train_like_one_process(ranks, setting):
    assert_as_in_one_process(ranks, setting)


@pytest.mark.exhaustive
@pytest.mark.parametrize("setting", WITH_FOUR)
def test_four_ranks_train_like_one_process(four_ranks, setting):
    assert_as_in_one_process(four_ranks, setting)


@pytest.mark.parametrize("setting", ["ddp/mole/none", "ddp/moextend/none", "ddp-unused/moe_llava/none"])
def test_an_expert_was_without_a_token_on_one_rank_alone(ranks, setting):
    first, second = (rank[setting]["idle"] for rank in ranks)
    assert any(idle and not busy for busy, idle in zip(first, second, strict=True))


def test_processes_that_ran_different_routers_are_told_so(ranks):
    for rank in ranks:
        assert "ran different routers" in rank["global-corners"]["error"]


def test_the_logged_auxiliary_loss_is_that_of_all_processes(ranks):
    first, second = (rank["global-corners"] for rank in ranks)
    assert first["logged"] == second["logged"] == pytest.approx(first["aux_loss"], rel=1e-6)
    assert first["aux_loss"] == pytest.approx(second["aux_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "is_global"), [("ddp/mole", False), ("fsdp/mole", False), ("ddp/mole-global", True)]
)
def test_gradient_of_the_auxiliary_loss_is_the_one_computed_by_hand(ranks, setting, is_global):
    assert ratio_of_aux_loss(ranks[0], setting, is_global=is_global) == pytest.approx(1.0, abs=1e-4)


def ratio_of_aux_loss(found: dict, setting: str, *, is_global: bool) -> float:
    """Gradient of the auxiliary loss in the first step over the one computed by hand, in norm."""
    task_only = flat(found[f"{setting.removesuffix('-global')}-task-only/none"]["gradient"])
    effect = flat(found[f"{setting}/none"]["gradient"]) - task_only
    (step, *_) = steps_of(CASES["mole"])
    model = parallel_cases.mole(0.0).train()
    total = 0.0
    for row in step:
        for batch in [joined(row)] if is_global else row:
            share = batch["labels"][:, 1:].ne(-100).sum() / batch["num_items_in_batch"]
            total = total + share * aux_by_hand(model, batch)
            if is_global:
                total = total + share * 0.1 * z_loss_by_hand(model, batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True)
    expected = flat(dict(zip(trained, gradients, strict=True)))
    assert torch.nn.functional.cosine_similarity(effect, expected, dim=0) == pytest.approx(1.0, abs=1e-5)
    return (effect.norm() / expected.norm()).item()


def z_loss_by_hand(model, batch):
    logits = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: logits.append(output.router_logits))
        for name, module in model.named_modules()
        if name.endswith("mole_router.default")
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    rows = batch["attention_mask"].flatten().bool()
    return sum(entry[rows].logsumexp(-1).square().mean() for entry in logits) / len(logits)


@pytest.mark.parametrize("name", ["mole", "mocle", "moextend"])
def test_what_fsdp_gathered_and_saved_loads_in_one_process(ranks, run_folder, name):
    found = ranks[0][f"fsdp/{name}/none"]
    base = BY_NAME["mixtral"].build() if name == "moextend" else tiny_llama()
    loaded = PeftModel.from_pretrained(base, run_folder / name, is_trainable=True)
    parameters = dict(loaded.named_parameters())
    for key, weight in found["weights"].items():
        assert torch.equal(parameters[key], weight), key
    batch = {**text_batch(0, 0), **({"cluster_ids": torch.tensor([0, 3])} if name == "mocle" else {})}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, found["logits"])


def test_shared_cluster_embeddings_in_the_group_of_a_layer_are_refused(ranks):
    for rank in ranks:
        error = rank["shared-table"]["error"]
        assert "ClusterEmbedding" in error and "cluster_embedding_scope='layer'" in error
