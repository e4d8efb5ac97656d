"""`Trainer` gives the auxiliary loss of each micro-batch the weight of its task loss, whatever the settings."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from aux_by_hand import COEF, GradientTrap, assert_same, build, expected_gradient, label_share, outside_loss, rows_of
from tiny_models import token_batch


@pytest.mark.parametrize("loss_type", ["switch", pytest.param("mole", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("steps", "arguments", "trainer_arguments"),
    [
        pytest.param(1, {}, {}, id="plain"),
        pytest.param(4, {}, {}, id="accumulation"),
        pytest.param(4, {"gradient_checkpointing": True}, {}, id="accumulation-checkpointing"),
        pytest.param(
            4,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
            id="accumulation-reentrant",
        ),
        pytest.param(4, {"label_smoothing_factor": 0.1}, {}, id="label-smoothing"),
        pytest.param(4, {}, {"compute_loss_func": outside_loss}, id="compute-loss-func"),
        pytest.param(2, {"bf16": True}, {}, id="bf16-autocast"),
    ],
)
def test_trainer_gives_each_micro_batch_its_share(tmp_path, loss_type, steps, arguments, trainer_arguments):
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(steps)]
    is_bf16 = arguments.get("bf16", False)
    # bf16 rounds the gradient of task and auxiliary loss together: the larger the latter, the less of it is lost
    factor = 10 if is_bf16 else 1
    found = []
    for coef in (factor * COEF, 0.0):
        model = build(coef=coef, router_aux_loss_type=loss_type)
        trainer = GradientTrap(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=steps,
                max_steps=1,
                max_grad_norm=0,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                train_sampling_strategy="sequential",
                **arguments,
            ),
            train_dataset=rows_of(batches),
            **trainer_arguments,
        )
        trainer.train()
        found.append(trainer.trapped)
    difference = found[0] - found[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        expected = factor * expected_gradient(batches, label_share(batches), loss_type)
    if is_bf16:
        assert (difference.norm() / expected.norm()).item() == pytest.approx(1.0, abs=1e-2)
        assert torch.nn.functional.cosine_similarity(difference, expected, dim=0) > 0.999
        return
    assert_same(difference, expected)
