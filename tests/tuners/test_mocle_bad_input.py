"""What makes no sense is refused before anything is built, with what was wrong, what was found and what to do."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from test_mocle_formula import IDS, SETTINGS, build
from torch import nn

from peft_moe import InstructionClusterer, MoCLEConfig
from peft_moe.tuners.mocle import MoCLELayer
from tiny_models import tiny_llama, token_batch


# those of its own: tests/tuners/test_mole_bad_input.py has the fields that both methods share
FIELDS = {
    "num_clusters": (0, "num_clusters must be a whole number of at least 1, but is 0"),
    "num_experts": (1, "num_experts must be at least 2, but is 1.*use LoRA"),
    "top_k": (5, "top_k is 5 and num_experts is 4"),
    "temperature": (0, "temperature must be a positive number, but is 0"),
    "gate_noise_std": (-1.0, "gate_noise_std must be a number and not negative, but is -1.0"),
    "gate_dtype": ("float16", "gate_dtype must be 'float32', but is 'float16'"),
    "gate_scope": ("model", "gate_scope must be one of 'layer', 'module', but is 'model'"),
    "cluster_embedding_scope": ("module", "needs a gate per linear, but gate_scope is 'layer'"),
    "cluster_embedding_init": ("zeros", "cluster_embedding_init must be one of"),
    "fallback": ("random", "fallback must be one of 'error', 'universal', but is 'random'"),
    "instruction_template": ("Question:", r"template of instructions has to contain '\{\}' exactly once"),
    "instruction_pattern": (".*", "instruction_pattern '.*' has 0 groups"),
    "universal_expert": ("yes", "universal_expert must be True or False, but is 'yes'"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_makes_no_sense_is_named(field):
    value, message = FIELDS[field]
    with pytest.raises(ValueError, match=f"(?s)MoCLEConfig cannot be used.*{message}"):
        MoCLEConfig(**{field: value})


def test_a_universal_fallback_needs_a_universal_expert():
    with pytest.raises(ValueError, match="fallback='universal' needs universal_expert=True"):
        MoCLEConfig(fallback="universal", universal_expert=False)


def test_a_field_that_contradicts_the_clusterer_is_refused():
    clusterer = InstructionClusterer(torch.eye(3, 5), encoder="an/encoder")
    with pytest.raises(ValueError, match="num_clusters is 4, but the clusterer has 3. Leave it out"):
        MoCLEConfig.from_clusterer(clusterer, num_clusters=4)


TARGETS = {
    "an activation": (["up_proj", "act_fn"], r"MoCLE needs nn.Linear, but 'model.layers.0.mlp.act_fn' is SiLU"),
    "an embedding": (["embed_tokens"], "MoCLE needs nn.Linear, but 'model.embed_tokens' is Embedding"),
    "nothing": (["w9"], r"Target modules \['w9'\] not found in the base model: no module of LlamaForCausalLM"),
}


@pytest.mark.parametrize(("targets", "message"), TARGETS.values(), ids=TARGETS)
def test_a_target_that_cannot_have_experts_is_refused_before_any_is_changed(targets, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoCLEConfig(**{**SETTINGS, "target_modules": targets}))
    assert not any(isinstance(module, MoCLELayer) for module in model.modules())


def test_a_model_without_an_mlp_needs_target_modules():
    with pytest.raises(ValueError, match="MoCLE found no MLP in Sequential.*target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MoCLEConfig(**{**SETTINGS, "task_type": None}))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_export_is_named(call):
    model = build()
    expected = model(**token_batch(), cluster_ids=IDS).logits
    with pytest.raises(ValueError, match="cannot be merged into one weight.*export_cluster_lora"):
        getattr(model, call)()
    assert torch.equal(model(**token_batch(), cluster_ids=IDS).logits, expected)


def test_data_parallel_is_refused():
    model = build()
    for module in model.modules():
        module._is_replica = True
    with pytest.raises(RuntimeError, match="MoCLELayer does not support nn.DataParallel"):
        model(**token_batch(), cluster_ids=IDS)
