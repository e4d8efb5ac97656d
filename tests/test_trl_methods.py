"""Every tuner under trl's SFT, DPO and GRPO: the trainer makes the adapter, micro-batches, checkpointing, resuming."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import test_trl
import test_trl_mocle
import test_trl_moextend
from peft_moe import MoCLEConfig, MoExtendConfig, MoLEConfig
from test_trl import preference_rows, trapping
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_moe import BY_NAME


trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


def mocle_that_finds_clusters() -> nn.Module:
    model = test_trl_mocle.build()
    test_trl_mocle.attach_to(model)
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
TRAINED_BEFORE = {
    "mole": test_trl.build,
    "mocle": mocle_that_finds_clusters,
    "moextend": test_trl_moextend.extended,
}
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


def trainer_of(name: str, model: nn.Module, folder, *, peft_config=None, **settings):
    """trl's trainer `name`, which keeps its first gradients."""
    arguments, others = {**SETTINGS, **settings}, {}
    if name == "GRPO":
        arguments |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        others["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids]
    return trapping(getattr(trl, f"{name}Trainer"))(
        model,
        args=getattr(trl, f"{name}Config")(str(folder), **arguments),
        train_dataset=DATA[name],
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **others,
    )


def copies_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


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
    after = dict(trainer.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == own


@pytest.mark.exhaustive
@every_method
@every_trainer
def test_checkpointing_leaves_the_gradients_of_micro_batches_as_they_are(tmp_path, name, method):
    found = []
    for checkpointing in (True, False):
        trainer = trainer_of(
            name, TRAINED_BEFORE[method](), tmp_path, gradient_checkpointing=checkpointing, max_steps=1
        )
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
