"""What the tests of this folder share: a MoLE model, its batches, and a count by hand."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_moe import MoLEConfig
from peft_moe.monitoring import ExpertLoad, ExpertPathways, record_expert_load, record_pathways
from peft_moe.monitoring.expert_load import LoadKey
from peft_moe.routing import TopKRouter
from tiny_models import tiny_llama


NUM_EXPERTS = 4


def build(base_model=None, **settings):
    defaults = {"num_experts": NUM_EXPERTS, "top_k": 1, "gate_scale": "straight_through", "lora_dropout": 0.0}
    settings = {**defaults, "init_lora_weights": False, **settings}
    model = tiny_llama() if base_model is None else base_model
    torch.manual_seed(3)
    return get_peft_model(model, MoLEConfig(task_type="CAUSAL_LM", **settings))


def load_of(counts: dict[tuple[str, str, str, str], list[int]]) -> ExpertLoad:
    """`(adapter, router, domain, token group) → counts`."""
    load = ExpertLoad()
    for key, values in counts.items():
        load.add_counts(LoadKey(*key), torch.tensor(values))
    return load


@torch.no_grad()
def load_in(model, *batches) -> ExpertLoad:
    with record_expert_load(model) as load:
        for batch in batches:
            model(**batch)
    return load


@torch.no_grad()
def pathways_in(model, *batches, **options) -> ExpertPathways:
    with record_pathways(model, **options) as pathways:
        for batch in batches:
            model(**batch)
    return pathways


def check_picture(path) -> None:
    """It is large enough to be read, and not of one colour."""
    pixels = pytest.importorskip("matplotlib.image").imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])[::7].round(2).tolist()}) > 8


class HandCount:
    """Counts with hooks on the routers and the masks that it is told: `counts[phase][router]`, E numbers each.

    Gradient checkpointing runs the hooks again; the count is only right without it.
    """

    def __init__(self, model):
        self.counts = {"train": {}, "eval": {}}
        self.latest_index = {}
        self.mask = None
        for name, module in model.named_modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(
                    self._hook(name.removeprefix("base_model.model.").partition(".gate_proj")[0])
                )
        model.get_base_model().register_forward_pre_hook(self._remember_mask, with_kwargs=True)

    def _remember_mask(self, module, args, kwargs):
        self.mask = kwargs["attention_mask"]

    def _hook(self, router):
        def hook(module, args, output):
            phase = "train" if torch.is_grad_enabled() else "eval"
            self.latest_index[router] = output.top_k_index
            chosen = output.top_k_index[self.mask.flatten().bool()]
            counts = self.counts[phase].setdefault(router, [0] * output.num_experts)
            for expert in chosen.flatten().tolist():
                counts[expert] += 1

        return hook


def rows(num_rows: int, *, seed: int = 0) -> list[dict]:
    """Rows of 12 tokens with 0 to 5 tokens of padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(num_rows):
        input_ids = torch.randint(1, 64, (12,), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[12 - index % 6 :] = 0
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        data.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return data


def trainer_for(model, output_dir, callbacks, *, eval_dataset=None, num_rows=16, **arguments) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(output_dir), **{**settings, **arguments}),
        train_dataset=rows(num_rows),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )
