"""trl's trainers, unchanged: they build their loss outside the model, and the auxiliary loss still acts."""

from __future__ import annotations

import pytest
import torch

from aux_by_hand import COEF, assert_same, build, expected_gradient, gradients, label_share
from tiny_models import tiny_tokenizer, token_batch


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


@pytest.mark.parametrize("loss_type", ["switch", "mole"])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
def test_sft_gives_each_micro_batch_its_share(tmp_path, checkpointing, loss_type):
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(3)]
    found = []
    for coef in (COEF, 0.0):
        model = build(coef=coef, router_aux_loss_type=loss_type)
        args = trl.SFTConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=1,
            max_grad_norm=0,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            train_sampling_strategy="sequential",
            gradient_checkpointing=checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = trapping(trl.SFTTrainer)(
            model, args, train_dataset=datasets.Dataset.from_list(rows_of(batches)), processing_class=tiny_tokenizer()
        )
        trainer.train()
        found.append(trainer.trapped)
    expected = expected_gradient(batches, label_share(batches), loss_type)
    assert_same(found[0] - found[1], expected)


def preference_rows():
    return datasets.Dataset.from_list(
        [
            {"prompt": "a b c", "chosen": " d e f g", "rejected": " h i"},
            {"prompt": "b c", "chosen": " e e", "rejected": " a a j"},
        ]
        * 2
    )


def test_dpo_with_a_pretrained_adapter_keeps_a_reference_copy(tmp_path):
    model = build()
    args = trl.DPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", learning_rate=1e-2, gradient_accumulation_steps=2,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    trainer = trl.DPOTrainer(model, args=args, train_dataset=preference_rows(), processing_class=tiny_tokenizer())
    reference = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert len(reference) == len(before)
    for name, parameter in before.items():
        assert torch.equal(reference[name.replace(".default.", ".ref.")], parameter)
    assert trainer.train().training_loss > 0
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("mole_router" in name for name in moved) and any("mole_A" in name for name in moved)
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:
            assert torch.equal(parameter, reference[name])


def test_grpo_trains_experts_and_routers(tmp_path):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = trl.GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", learning_rate=1e-2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e"}] * 2),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert any("mole_router" in name for name in moved)
    assert any("mole_B" in name for name in moved)
