"""trl's trainers, unchanged, on a mixture with new experts: only those move, and the balance loss arrives."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe import MoExtendConfig
from test_trl import preference_rows, rows_of, trapping
from tiny_models import tiny_tokenizer, token_batch
from tiny_moe import BY_NAME


trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow
COEF = 0.5
SETTINGS = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "max_steps": 2,
}


def extended(coef: float = COEF) -> PeftModel:
    """A tiny Mixtral whose layers 0 and 2 have a new expert."""
    config = MoExtendConfig(layers=[0, 2], copy_sources={0: 1, 2: 2}, router_aux_loss_coef=coef, task_type="CAUSAL_LM")
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_only_new_experts_moved(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Experts and rows of both layers, and nothing of the base model."""
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved and all("moextend_" in name and ".default." in name for name in moved)
    for layer in (0, 2):
        for part in ("moextend_gate", "moextend_experts"):
            assert any(f"layers.{layer}." in name and part in name for name in moved), (layer, part)


def balance_gradient(batches: list[dict[str, torch.Tensor]], weights: list[float]) -> torch.Tensor:
    """Σ weight · COEF · gradient of Switch's loss of the two routers, written here from its formula."""
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


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
def test_sft_moves_new_experts_and_gives_the_balance_loss_its_share(tmp_path, checkpointing):
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(3)]
    found = []
    for coef in (COEF, 0.0):
        model = extended(coef)
        before = parameters_of(model)
        args = trl.SFTConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            dataset_kwargs={"skip_prepare_dataset": True},
            **SETTINGS,
        )
        rows = datasets.Dataset.from_list(rows_of(batches))
        trainer = trapping(trl.SFTTrainer)(model, args, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
        assert_only_new_experts_moved(trainer.model, before)
        found.append(trainer.trapped)
    counts = torch.tensor([batch["labels"][:, 1:].ne(-100).sum() for batch in batches]).double()
    expected = balance_gradient(batches, (counts / counts.sum()).tolist())
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found[0] - found[1], expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_dpo_keeps_a_reference_copy_of_the_new_experts(tmp_path):
    gradients = []
    for coef in (COEF, 0.0):
        model = extended(coef)
        before = parameters_of(model)
        args = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=2, **SETTINGS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trapping(trl.DPOTrainer)(
                model, args=args, train_dataset=preference_rows(), processing_class=tiny_tokenizer()
            )
        reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
        own = {name for name in before if "moextend_" in name}
        assert {name.replace(".ref.", ".default.") for name in reference} == own
        assert all(torch.equal(p, before[n.replace(".ref.", ".default.")]) for n, p in reference.items())
        trainer.train()
        assert_only_new_experts_moved(trainer.model, before)
        assert all(torch.equal(trainer.model.get_parameter(name), p) for name, p in reference.items())
        gradients.append(trainer.trapped)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0] - gradients[1]).norm() > 1e-3


def test_grpo_moves_new_experts(tmp_path):
    gradients = []
    for coef in (COEF, 0.0):
        model = extended(coef)
        before = parameters_of(model)
        args = trl.GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            seed=1,
            **SETTINGS,
        )
        trainer = trapping(trl.GRPOTrainer)(
            model,
            reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e"}] * 2),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        assert_only_new_experts_moved(trainer.model, before)
        gradients.append(trainer.trapped)
    assert (gradients[0] - gradients[1]).norm() > 1e-3
