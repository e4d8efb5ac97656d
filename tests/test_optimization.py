"""Routers can have a learning rate of their own under the plain Trainer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_moe import MoLEConfig, router_parameter_groups
from tiny_models import tiny_llama, token_batch


def test_trainer_uses_both_learning_rates(tmp_path):
    model = get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = router_parameter_groups(model, learning_rate=0.0, router_learning_rate=1e-2)
    batch = token_batch(4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups})).train()
    for name, parameter in model.named_parameters():
        has_moved = not torch.equal(parameter, before[name])
        assert has_moved == ("mole_router" in name), name


def test_groups_hold_every_trainable_parameter_once():
    model = get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM"))
    groups = router_parameter_groups(model, learning_rate=1e-3, router_learning_rate=1e-2, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_model_without_routers_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="no trainable router"):
        router_parameter_groups(model, learning_rate=1e-3, router_learning_rate=1e-2)
