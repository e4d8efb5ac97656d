"""The extended block against the formulas of the paper, by token; calibration, low-rank experts, balance loss."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from test_moextend_families import BY_NAME, config_for, every_family, extend, logits_of, routers_of, shaken
from torch import nn

from peft_moe import get_aux_loss
from peft_moe.tuners.moextend.experts import full_weights
from tiny_moe import FAMILIES, NUM_EXPERTS, moe_batch


MIXTRAL = BY_NAME["mixtral"]
SCORING = {  # is_sigmoid, is_normalized
    "phimoe": None,
    "gemma4": None,  # scales them by expert
    "deepseek_v3": (True, True),
    "glm4_moe": (True, True),
    "nemotron_h": (True, True),
    "qwen2_moe": (False, False),
    "olmoe": (False, False),
    "flex_olmo": (False, False),
    "deepseek_v2": (False, False),
    "jamba": (False, False),
    "dots1": (True, False),
    **dict.fromkeys(
        ("minimax_m2", "afmoe", "lfm2_moe", "solar_open", "exaone_moe", "glm4_moe_lite", "hy_v3"), (True, True)
    ),
}


def block_of(model: nn.Module, layer: int = 0) -> nn.Module:
    """The mixture of experts of a layer."""
    router = next(router for router in routers_of(model) if router.block.layer == layer)
    return model.base_model.model.get_submodule(router.block.name)


def one_token(block: nn.Module, x: torch.Tensor, form: str | None) -> torch.Tensor:
    """Section 3 of the paper for one token `(D,)`, top-2; `form` is that of the calibration."""
    router, experts = block.gate, block.experts
    new = full_weights(experts.moextend_experts["default"])
    stacked = {name: torch.cat([getattr(experts.base_layer, name), new[name]]) for name in new}
    rows = torch.cat([router.base_layer.weight, router.moextend_gate["default"].weight])
    p = torch.softmax(rows @ x, dim=0)
    chosen = sorted(range(len(p)), key=lambda e: -float(p[e]))[:2]
    q = p
    if form == "released_code":
        calibration = router.moextend_calibration["default"]
        q = p + calibration.out_weight @ F.gelu(calibration.in_weight @ p)
    weights = {e: q[e] / sum(q[c] for c in chosen) for e in chosen}
    if form == "paper":
        calibration = router.moextend_calibration["default"]
        correction = calibration.out_weight @ F.gelu(calibration.in_weight @ x)
        weights = {e: weight * (1 + correction[e]) for e, weight in weights.items()}
    y = torch.zeros_like(x)
    for e, weight in weights.items():
        gate, up = (stacked["gate_up_proj"][e] @ x).chunk(2)
        y = y + weight * (stacked["down_proj"][e] @ (F.silu(gate) * up))
    return y


@pytest.mark.parametrize("expert_type", ["ffn", "lora"])
@pytest.mark.parametrize("form", [None, "released_code", "paper"])
def test_outputs_and_gradients_are_those_of_the_formula(form, expert_type):
    model = extend(MIXTRAL, shake=0.1, calibration=form, expert_type=expert_type, num_new_experts=2)
    block = block_of(model)
    x = torch.randn(1, 12, 32, requires_grad=True)
    found = block(x)
    expected = torch.stack([one_token(block, token, form) for token in x[0]])[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    inputs = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    probe = torch.randn(found.shape)
    gradients = [torch.autograd.grad((y * probe).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_family
def test_how_a_router_weighs_is_measured(family):
    scoring = routers_of(extend(family))[0].probe.scoring
    expected = SCORING.get(family.name, (False, True))
    assert (None if scoring is None else (scoring.is_sigmoid, scoring.is_normalized)) == expected
    assert scoring is None or not scoring.is_single


@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "dots1", "gpt_oss"])
def test_the_calibration_of_the_released_code_is_its_formula_however_the_router_weighs(name):
    if name not in BY_NAME:
        pytest.skip("transformers does not have the family yet")
    family = BY_NAME[name]
    is_sigmoid, is_normalized = SCORING.get(name, (False, True))
    model = extend(family, shake=0.1, calibration="released_code", num_new_experts=2)
    router = routers_of(model)[0]
    seen = []
    router.register_forward_hook(lambda module, args, output: seen.append((args[0], *output)))
    model(**moe_batch())
    ((x, _, found, index),) = seen
    gate, calibration = router.moextend_gate["default"], router.moextend_calibration["default"]
    rows = torch.cat([router.base_layer.weight, gate.weight])
    bias = torch.cat([router.base_layer.bias, gate.bias]) if name == "gpt_oss" else None
    logits = F.linear(x.flatten(0, -2), rows, bias)
    p = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1)
    assert torch.equal(index.sort().values, p.topk(2).indices.sort().values)
    q = p + F.linear(F.gelu(F.linear(p, calibration.in_weight)), calibration.out_weight)
    q = q.gather(-1, index)
    assert q.min() > 0  # no limit reached
    scale = getattr(model.config, "routed_scaling_factor", 1.0)
    expected = scale * (q / q.sum(dim=-1, keepdim=True) if is_normalized else q)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, scale * p.gather(-1, index), rtol=1e-2)
    probe = torch.randn(found.shape)
    inputs = [*gate.parameters(), *calibration.parameters()]
    gradients = [torch.autograd.grad((w * probe).sum(), inputs, retain_graph=True) for w in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


TOP_1 = {
    "a fixed weight": ("mixtral", {"calibration": "released_code"}, False),
    "a fixed weight in inference": ("mixtral", {"calibration": "released_code", "inference_mode": True}, False),
    "the other form": ("mixtral", {"calibration": "paper"}, True),
    "a weight that varies": ("qwen2_moe", {"calibration": "released_code"}, True),
}


@pytest.mark.parametrize(("name", "settings", "acts"), TOP_1.values(), ids=TOP_1)
def test_a_calibration_that_cannot_act_on_a_single_expert_is_said_once(name, settings, acts, tmp_path):
    family = BY_NAME[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(family.build(num_experts_per_tok=1), config_for(family, **settings)).eval()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(family.build(num_experts_per_tok=1), tmp_path, is_trainable=True)
    said = [str(entry.message) for entry in caught if "choose one expert per token" in str(entry.message)]
    assert len(said) == (not acts and "inference_mode" not in settings)
    assert all("the routers of layers [0, 1, 2] choose" in message for message in said)
    plain = logits_of(model)
    for router in routers_of(model):
        router.moextend_calibration["default"].out_weight.data.normal_()
    assert torch.allclose(logits_of(model), plain, rtol=1e-5, atol=1e-5) is not acts


@every_family
@pytest.mark.parametrize("form", ["released_code", "paper"])
def test_calibration_begins_as_the_identity_and_then_acts_and_trains(family, form):
    if form == "released_code" and SCORING.get(family.name, ()) is None:
        with pytest.raises(ValueError, match="proportional neither to the softmax nor to the sigmoid"):
            extend(family, calibration=form)
        return
    model = extend(family, calibration=form)
    plain = logits_of(extend(family))
    torch.testing.assert_close(logits_of(model), plain, rtol=1e-5, atol=1e-5)
    shaken(model, 0.1)
    with_it = logits_of(model)
    for router in routers_of(model):
        router.moextend_calibration["default"].out_weight.data.zero_()
    assert not torch.allclose(with_it, logits_of(model), rtol=1e-3, atol=1e-4)
    model(**moe_batch()).loss.backward()
    assert all(router.moextend_calibration["default"].out_weight.grad.any() for router in routers_of(model))


def test_calibration_stays_float32_and_positive_in_a_half_precision_model():
    model = extend(MIXTRAL, calibration="released_code").bfloat16()
    for router in routers_of(model):
        calibration = router.moextend_calibration["default"]
        assert calibration.in_weight.dtype == calibration.out_weight.dtype == torch.float32
        calibration.in_weight.data.fill_(1.0)
        calibration.out_weight.data.fill_(-100.0)  # every q would be negative
    assert logits_of(model).isfinite().all()


@every_family
def test_low_rank_experts_begin_as_their_source(family):
    found, expected = extend(family, expert_type="lora"), extend(family, expert_type="ffn")
    assert torch.equal(logits_of(found), logits_of(expected))
    assert found.num_parameters(only_trainable=True) > 0
    shaken(found, 0.1)
    found(**moe_batch()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in found.named_parameters() if n.endswith("_A"))


def test_the_balance_loss_is_that_of_every_layer_with_its_own_number_of_experts():
    counts = {0: 1, 1: 2, 2: 3}
    sources = dict.fromkeys(counts, 1)
    settings = {"num_new_experts": counts, "copy_sources": sources, "router_aux_loss_coef": 0.5}
    model = extend(MIXTRAL, shake=0.1, **settings).train()
    seen = []
    for router in routers_of(model):
        router.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**moe_batch())
    losses = []
    for logits, _, index in seen:
        num_experts = logits.shape[-1]
        share = F.one_hot(index, num_experts).float().sum(dim=1).mean(dim=0)
        losses.append(num_experts * (share * torch.softmax(logits.float(), dim=-1).mean(dim=0)).sum())
    assert [logits.shape[-1] for logits, _, _ in seen] == [5, 6, 7]
    torch.testing.assert_close(get_aux_loss(model), 0.5 * torch.stack(losses).mean())


def test_the_balance_loss_reaches_the_gate_rows_and_its_gradient_is_that_of_an_added_loss():
    found = []
    for is_added in (False, True):
        model = extend(MIXTRAL, shake=0.1, router_aux_loss_coef=0.5).train()
        loss = model(**moe_batch()).loss
        (loss + get_aux_loss(model) if is_added else loss).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    plain = extend(MIXTRAL, shake=0.1).train()
    plain(**moe_batch()).loss.backward()
    name = "base_model.model.model.layers.0.mlp.gate.moextend_gate.default.weight"
    assert not torch.allclose(plain.get_parameter(name).grad, found[0][name])


def test_only_the_pairs_of_a_new_expert_are_computed():
    model = extend(MIXTRAL, shake=0.1)
    block = block_of(model)
    rows = {"old": 0, "new": 0}
    experts = block.experts

    def count(kind):
        return lambda module, args: rows.__setitem__(kind, rows[kind] + args[1].numel())

    experts.base_layer.register_forward_pre_hook(count("old"))
    experts.moextend_experts["default"].register_forward_pre_hook(count("new"))
    x = torch.randn(1, 12, 32)
    index = block.gate(x[0])[2]
    block(x)
    assert rows == {"old": int((index < NUM_EXPERTS).sum()), "new": int((index >= NUM_EXPERTS).sum())}
    assert rows["new"] > 0


def test_an_expert_without_a_token_takes_part_in_training():
    model = extend(MIXTRAL, init="copy_guarded").train()
    model(**moe_batch()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "moextend_experts" in n)
    assert not any(p.grad.any() for n, p in model.named_parameters() if "moextend_experts" in n)


def test_a_copy_of_the_model_computes_the_same():
    model = extend(MIXTRAL, shake=0.1, expert_type="lora")
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), logits_of(model))
    low_rank = next(m for m in other.modules() if hasattr(m, "_base"))
    assert any(low_rank._base[0] is module for module in other.modules())


def test_the_table_of_families_is_the_one_that_is_promised():
    if Version(transformers.__version__) < Version("5.17"):
        pytest.skip("routers of older transformers leave part of the routing to the block around them")
    assert len(FAMILIES) == len({family.name for family in FAMILIES}) >= 15
    assert config_for(MIXTRAL).num_new_experts == 1
