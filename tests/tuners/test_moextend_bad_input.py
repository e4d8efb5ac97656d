"""What makes no sense is refused before anything is built, with what was wrong, what was found and what to do."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import get_peft_model
from test_moextend_families import BY_NAME, MoExtendConfig, config_for, extend, logits_of, routers_of
from torch import nn

from peft_moe.tuners.moextend.layer import MoExtendLayer
from tiny_models import tiny_llama
from tiny_moe import COMMON, NUM_EXPERTS


MIXTRAL = BY_NAME["mixtral"]
FIELDS = {
    "num_new_experts": (0, "num_new_experts must be a whole number of at least 1, but is 0"),
    "num_new_experts of a layer": (
        {0: 1, 1: 0},
        r"num_new_experts\[1\] must be a whole number of at least 1, but is 0",
    ),
    "num_new_experts of none": ({}, "num_new_experts is an empty dictionary"),
    "num_new_experts in a list": (
        {0: [1], 1: 1},
        r"num_new_experts\[0\] must be a whole number of at least 1, but is",
    ),
    "modules_to_save": ("lm_head", "modules_to_save must be a list of names, but is 'lm_head'"),
    "target_modules": ([["gate"]], "target_modules must be a list of names, but is"),
    "layers": ([0, -1], "layers must name layers by their number, counted from 0, but has -1"),
    "layers of none": ([], "layers is empty"),
    "layers in words": ("all", "layers must be a list of layer numbers, but is 'all'"),
    "init": ("noise", "init must be one of 'copy', 'copy_guarded', 'zero_gate', 'mean_gate', but is 'noise'"),
    "copy_sources": ([1], r"copy_sources must be a dictionary \{layer: expert\}, but is \[1\]"),
    "copy_sources of a layer": ({0: -1}, r"copy_sources\[0\] must be the number of an expert, but is -1"),
    "copy_sources of too many": ({0: [1, 2]}, r"copy_sources\[0\] names 2 experts, but the layer gets 1"),
    "guard_offset": (3.0, "guard_offset must be a number of at most 0, but is 3.0"),
    "expert_type": ("moe", "expert_type must be one of 'ffn', 'lora', but is 'moe'"),
    "r": (0, "r must be a whole number of at least 1, but is 0"),
    "lora_alpha": (0, "lora_alpha must be a positive number, but is 0"),
    "calibration": ("on", "calibration must be one of None, 'released_code', 'paper', but is 'on'"),
    "calibration_dim": (0, "calibration_dim must be a whole number of at least 1, but is 0"),
    "router_aux_loss_coef": (-1, "router_aux_loss_coef must be a number and not negative, but is -1"),
    "router_aux_loss_type": ("gini", "router_aux_loss_type must be one of 'switch', 'pooled', 'mole', but is 'gini'"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_makes_no_sense_is_named(field):
    value, message = FIELDS[field]
    with pytest.raises(ValueError, match=f"(?s)MoExtendConfig cannot be used.*{message}"):
        MoExtendConfig(**{field.split()[0]: value})


def test_a_pooled_loss_needs_equal_numbers():
    with pytest.raises(ValueError, match="'pooled' pools all routers.*Use 'switch' where num_new_experts differs"):
        MoExtendConfig(num_new_experts={0: 1, 1: 2}, router_aux_loss_type="pooled")


def test_layers_beside_a_dictionary_are_refused():
    with pytest.raises(ValueError, match="layers has no effect beside a dictionary"):
        MoExtendConfig(num_new_experts={0: 1}, layers=[0])


def llama4() -> nn.Module:
    """Its block scales what experts read, and sends all of it to all of them."""
    settings = {"num_local_experts": NUM_EXPERTS, "intermediate_size_mlp": 16, "interleave_moe_layer_step": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**COMMON, **settings}))


def jetmoe() -> nn.Module:
    """Its attention consists of experts, and those of its MLPs are not in a child of that name."""
    settings = {"num_local_experts": NUM_EXPERTS, "kv_channels": 8}
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**{**COMMON, **settings}))


def dbrx() -> nn.Module:
    """Its experts are one flat matrix."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 64}
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0}
    return transformers.DbrxForCausalLM(transformers.DbrxConfig(**sizes, ffn_config=ffn, attn_config=attention))


MODELS = {
    "a layer out of range": (MIXTRAL.build, {"layers": [2, 3]}, r"Layers \[3\] of MixtralForCausalLM.*\[0, 1, 2\]"),
    "a layer without experts": (
        BY_NAME["qwen3_moe"].build,
        {"layers": [1]},
        r"Layers \[1\] of Qwen3MoeForCausalLM cannot get new experts. Layers that can: \[0, 2\]",
    ),
    "a source that is not there": (
        MIXTRAL.build,
        {"copy_sources": {0: 0, 1: NUM_EXPERTS, 2: 0}},
        r"copy_sources\[1\] names expert 4, but 'model.layers.1.mlp.experts' has 4 experts, counted from 0 to 3",
    ),
    "sources of a layer left out": (
        MIXTRAL.build,
        {"layers": [0], "copy_sources": {0: 0, 2: 1}},
        r"copy_sources names layers \[2\], which get no new experts. Those that do: \[0\]",
    ),
    "a dense model": (tiny_llama, {}, "LlamaForCausalLM has no mixture of experts.*upcycling, or use MoLEConfig"),
    "an offset where the router normalises its input": (
        lambda: BY_NAME["gemma4"].build(),
        {"init": "copy_guarded"},
        "has no place for the offset of copy_guarded",
    ),
    "llama4_text": (
        llama4,
        {},
        r"layers.0.feed_forward.experts' \(Llama4TextExperts\) takes hidden_states instead of hidden_states, "
        "top_k_index and top_k_weights, so that no token can be sent to new experts.",
    ),
    "jetmoe": (
        jetmoe,
        {},
        r"JetMoeForCausalLM cannot get new experts.*JetMoeMoA\) does not keep its experts as stacked 3-D",
    ),
    "dbrx": (
        dbrx,
        {},
        r"DbrxForCausalLM cannot get new experts.*DbrxExperts\) does not keep its experts as stacked 3-D",
    ),
    "groups that do not divide": (
        lambda: BY_NAME["deepseek_v3"].build(n_group=2, n_routed_experts=4),
        {},
        "chooses among 2 groups of equal size, which 4 [+] 1 experts do not make. Choose num_new_experts so that",
    ),
}


@pytest.mark.parametrize(("build", "settings", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_extended_so_is_refused_before_anything_is_changed(build, settings, message):
    model = build()
    defaults = {"copy_sources": None, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, MoExtendConfig(**{**defaults, **settings}))
    assert not any(isinstance(module, MoExtendLayer) for module in model.modules())
    assert not any("peft_moe.tuners.moextend" in type(h).__module__ for h in model._forward_pre_hooks.values())


class Block(nn.Module):
    """A mixture of experts that is not laid out as those of transformers."""

    def __init__(self, router: nn.Module, experts: nn.Module, name: str = "gate") -> None:
        super().__init__()
        self.experts = experts
        setattr(self, name, router)


class Stacked(nn.Module):
    """Experts with parameters of these shapes."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for position, shape in enumerate(shapes):
            tensor = torch.zeros(shape, dtype=dtype)
            self.register_parameter(f"p{position}", nn.Parameter(tensor, requires_grad=dtype.is_floating_point))


GOOD = ((4, 8, 8), (4, 8, 8))
LAYOUTS = {
    "a list of experts": (lambda: Block(nn.Linear(8, 4), nn.ModuleList([nn.Linear(8, 8)])), "stacked 3-D parameters"),
    "no router": (
        lambda: Block(nn.Linear(8, 4), Stacked(*GOOD), "score"),
        "no router beside them that is called gate",
    ),
    "another first axis": (
        lambda: Block(nn.Linear(8, 4), Stacked((8, 4, 8), (4, 8, 8))),
        r"first axis differs \(\[4, 8\]\)",
    ),
    "quantised experts": (lambda: Block(nn.Linear(8, 4), Stacked(*GOOD, dtype=torch.int8)), "is quantised"),
    "a router with two matrices": (
        lambda: Block(nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4)), Stacked(*GOOD)),
        "has not exactly one matrix with 4 rows",
    ),
    "a router that returns logits alone": (
        lambda: Block(nn.Linear(8, 4, bias=False), Stacked(*GOOD)),
        "returns Tensor instead of logits, weights and choices. Without that MoExtend cannot extend",
    ),
}


@pytest.mark.parametrize(("block", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_an_unknown_layout_is_refused_and_never_guessed(block, message):
    model = nn.ModuleDict({"layers": nn.ModuleList([block()])})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoExtendConfig())


def test_absent_sources_are_expert_0_with_one_warning():
    with pytest.warns(UserWarning) as caught:
        model = extend(MIXTRAL, copy_sources=None)
    assert [str(w.message).split(",")[0] for w in caught if "MoExtend" in str(w.message)] == [
        "MoExtend: no copy_sources for layers [0"
    ]
    router = routers_of(model)[0]
    assert torch.equal(router.moextend_gate["default"].weight[0], router.base_layer.weight[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        MoExtendConfig(copy_sources={0: 1})


def test_a_broken_calibration_is_named():
    model = extend(MIXTRAL, calibration="released_code")
    routers_of(model)[0].moextend_calibration["default"].out_weight.data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"layers.0.mlp.gate \(calibration\)' \(adapter default\) gave values"
    ):
        logits_of(model)


def test_a_broken_gate_is_named():
    model = extend(MIXTRAL).train()
    routers_of(model)[0].moextend_gate["default"].weight.data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="layers.0.mlp.gate' .adapter default. gave values that are not finite"
    ):
        logits_of(model)


def test_safe_merge_refuses_what_is_not_finite():
    model = extend(MIXTRAL)
    routers_of(model)[0].moextend_gate["default"].weight.data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="The adapter default seems to be broken: moextend_gate.default.weight is not"
    ):
        model.merge_and_unload(safe_merge=True)
    model.add_adapter("sound", config_for(MIXTRAL))
    model.merge_and_unload(safe_merge=True, adapter_names=["sound"])


def test_data_parallel_is_refused():
    model = extend(MIXTRAL)
    for module in model.modules():
        module._is_replica = True
    with pytest.raises(RuntimeError, match="MoExtendRouter does not support nn.DataParallel"):
        logits_of(model)
