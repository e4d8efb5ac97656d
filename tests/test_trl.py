"""trl's SFT, DPO and GRPO, unchanged: every tuner trains, and the auxiliary loss acts though trl builds its loss."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import test_trl_mocle
from aux_by_hand import COEF, assert_same, build, expected_gradient, gradients, label_share
from peft_moe import MoCLEConfig, MoExtendConfig, MoLEConfig
from tiny_models import tiny_llama, tiny_tokenizer, token_batch
from tiny_moe import BY_NAME


trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


def trapping(trainer_cls):
    class Trapping(trainer_cls):
        """Keeps the gradients of the first optimizer step."""

        trapped = None

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)

            def trap(*_):
                if self.trapped is None:
                    self.trapped = gradients(self.model)

            optimizer.register_step_pre_hook(trap)
            return optimizer

    return Trapping


def rows_of(batches):
    return [
        {"input_ids": batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()}
        for batch in batches
        for i in range(batch["input_ids"].shape[0])
    ]


def preference_rows():
    return datasets.Dataset.from_list(
        [
            {"prompt": "a b c", "chosen": " d e f g", "rejected": " h i"},
            {"prompt": "b c", "chosen": " e e", "rejected": " a a j"},
        ]
        * 2
    )


def mocle_that_finds_clusters() -> nn.Module:
    model = test_trl_mocle.build()
    test_trl_mocle.attach_to(model)
    return model


def extended(coef: float = COEF) -> PeftModel:
    """A tiny Mixtral whose layers 0 and 2 have a new expert."""
    config = MoExtendConfig(layers=[0, 2], copy_sources={0: 1, 2: 2}, router_aux_loss_coef=coef, task_type="CAUSAL_LM")
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


NEW = {
    "mole": lambda: (tiny_llama(), MoLEConfig(num_experts=3, r=2, task_type="CAUSAL_LM")),
    "mocle": lambda: (
        tiny_llama(),
        MoCLEConfig.from_clusterer(test_trl_mocle.CLUSTERER, num_experts=3, r=2, task_type="CAUSAL_LM"),
    ),
    "moextend": lambda: (
        BY_NAME["mixtral"].build(),
        MoExtendConfig(init="copy", copy_sources={0: 1, 1: 1, 2: 2}, task_type="CAUSAL_LM"),
    ),
}
TRAINED_BEFORE = {"mole": build, "mocle": mocle_that_finds_clusters, "moextend": extended}
PARTS = {"mole": ("mole_router", "mole_A"), "moextend": ("moextend_gate", "moextend_experts")}
PROMPTS = ("a b c", "b c", "d w1", "c w2 w3")
DATA = {
    "SFT": datasets.Dataset.from_list([{"prompt": prompt, "completion": " w4 w5"} for prompt in PROMPTS]),
    "DPO": preference_rows(),
    "GRPO": datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
}
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "learning_rate": 1e-2,
}
every_method = pytest.mark.parametrize("method", list(NEW))
every_trainer = pytest.mark.parametrize("name", list(DATA))


def trainer_of(name: str, model: nn.Module, folder, *, data=None, peft_config=None, **settings):
    """trl's trainer `name`, which keeps its first gradients."""
    arguments, others = {**SETTINGS, **settings}, {}
    if hasattr(model.config, "output_router_logits"):
        # trl would ask the head for a balance loss of the base model's experts
        arguments["router_aux_loss_coef"] = 0.0
    if name == "GRPO":
        arguments |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        others["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids]
    return trapping(getattr(trl, f"{name}Trainer"))(
        model,
        args=getattr(trl, f"{name}Config")(str(folder), **arguments),
        train_dataset=data or DATA[name],
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **others,
    )


def copies_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved_since(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    after = dict(model.named_parameters())
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_only_the_adapter_moved(model: nn.Module, before: dict[str, torch.Tensor], method: str) -> None:
    """Experts and routers of the first and the last layer, and nothing of the base model."""
    moved = moved_since(before, model)
    assert all(f"{method}_" in name and ".default." in name for name in moved)
    for layer in (0, 2):
        for part in PARTS[method]:
            assert any(f"layers.{layer}." in name and part in name for name in moved), (layer, part)


def balance_gradient(batches: list[dict[str, torch.Tensor]], weights: list[float]) -> torch.Tensor:
    """Σ weight · COEF · gradient of Switch's loss of the two routers of `extended`, written from its formula."""
    model = extended(coef=0.0).train()
    total = torch.zeros(())
    for weight, batch in zip(weights, batches, strict=True):
        seen = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: seen.append(output))
            for name, module in model.named_modules()
            if name.endswith(("layers.0.mlp.gate", "layers.2.mlp.gate"))
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
        mask = batch["attention_mask"].flatten().bool()
        assert len(seen) == 2
        for logits, _, index in seen:
            share = nn.functional.one_hot(index[mask], 5).float().sum(dim=1).mean(dim=0)
            probability = logits[mask].float().softmax(dim=-1).mean(dim=0)
            total = total + weight * COEF * 5 * (share * probability).sum() / len(seen)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(total, trainable, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found]).double()


@pytest.mark.parametrize(
    ("method", "loss_type", "checkpointing"),
    [
        *(("mole", "switch", how) for how in ("none", "non_reentrant", "reentrant")),
        ("mole", "mole", "none"),
        *(pytest.param("mole", "mole", how, marks=pytest.mark.exhaustive) for how in ("non_reentrant", "reentrant")),
        ("moextend", "switch", "none"),
        ("moextend", "switch", "non_reentrant"),
    ],
)
def test_sft_gives_the_auxiliary_loss_of_each_micro_batch_its_share(tmp_path, method, loss_type, checkpointing):
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(3)]
    data = datasets.Dataset.from_list(rows_of(batches))
    found = []
    for coef in (COEF, 0.0):
        model = extended(coef) if method == "moextend" else build(coef=coef, router_aux_loss_type=loss_type)
        before = copies_of(model)
        trainer = trainer_of(
            "SFT",
            model,
            tmp_path,
            data=data,
            gradient_accumulation_steps=3,
            max_steps=1,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer.train()
        found.append(trainer.trapped)
        assert_only_the_adapter_moved(trainer.model, before, method)
    if method == "mole":
        assert_same(found[0] - found[1], expected_gradient(batches, label_share(batches), loss_type))
        return
    expected = balance_gradient(batches, label_share(batches))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found[0] - found[1], expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
@pytest.mark.parametrize("method", [pytest.param("mole", marks=pytest.mark.exhaustive), "moextend"])
def test_preferences_move_an_adapter_and_its_balance_but_not_the_reference(tmp_path, name, method):
    found = []
    for coef in (COEF, 0.0):
        model = TRAINED_BEFORE[method](coef=coef)
        before = copies_of(model)
        trainer = trainer_of(name, model, tmp_path)
        reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
        assert {n.replace(".ref.", ".default.") for n in reference} == {n for n in before if f"{method}_" in n}
        assert all(torch.equal(p, before[n.replace(".ref.", ".default.")]) for n, p in reference.items())
        trainer.train()
        assert_only_the_adapter_moved(trainer.model, before, method)
        assert not moved_since(reference, trainer.model)
        assert trainer.trapped.isfinite().all()
        found.append(trainer.trapped)
    assert (found[0] - found[1]).norm() > 1e-3


@every_method
@every_trainer
def test_the_trainer_makes_the_adapter_and_trains_all_of_it(tmp_path, name, method):
    base, config = NEW[method]()
    trainer = trainer_of(name, base, tmp_path, peft_config=config)
    if method == "mocle":
        test_trl_mocle.attach_to(trainer.model)
    before = copies_of(trainer.model)
    own = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert own and all(f"{method}_" in name and ".default." in name for name in own)
    trainer.train()
    assert moved_since(before, trainer.model) == own


@pytest.mark.exhaustive
@every_method
@every_trainer
def test_checkpointing_leaves_the_gradients_of_micro_batches_as_they_are(tmp_path, name, method):
    found = []
    for checkpointing in (True, False):
        model = TRAINED_BEFORE[method]()
        trainer = trainer_of(name, model, tmp_path, gradient_checkpointing=checkpointing, max_steps=1)
        trainer.train()
        found.append(trainer.trapped)
    assert found[0].norm() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6 * found[0].abs().max().item())


@pytest.mark.parametrize(
    "method", ["mocle", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("mole", "moextend"))]
)
def test_dpo_resumes_to_the_bit_with_its_reference(tmp_path, method):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of("DPO", TRAINED_BEFORE[method](), tmp_path, **saving)
    whole.train()
    model = TRAINED_BEFORE[method]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1  # so that what is not loaded shows
    resumed = trainer_of("DPO", model, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected, found = dict(whole.model.named_parameters()), dict(resumed.model.named_parameters())
    adapters = {name for name in expected if f"{method}_" in name}
    assert any(".ref." in name for name in adapters) and any(".default." in name for name in adapters)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
