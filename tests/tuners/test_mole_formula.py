"""MoLE computes what the paper says: each test compares with the formula or with a model that must agree."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_moe import MoLEConfig
from peft_moe.tuners import lora_layer
from peft_moe.tuners.mole import MoLELayer
from tiny_models import tiny_llama, token_batch


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATES = [
    pytest.param({"gate_scale": "none"}, id="none"),
    pytest.param({"gate_scale": "straight_through"}, id="straight-through"),
    pytest.param({"gate_scale": "straight_through", "normalize_top_k": False}, id="straight-through-unnormalised"),
    pytest.param({"gate_scale": "prob"}, id="prob"),
    pytest.param({"gate_scale": "prob", "normalize_top_k": False}, id="prob-unnormalised"),
    pytest.param({"soft": True}, id="soft"),
]


def build(dtype=torch.float32, **settings):
    settings = {"num_experts": 4, "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": False, **settings}
    config = MoLEConfig(task_type="CAUSAL_LM", **settings)
    config.router_aux_loss_coef = 0.0  # for the gradient of the task alone, which a configuration may refuse
    torch.manual_seed(5)
    return get_peft_model(tiny_llama(num_hidden_layers=2).to(dtype), config)


def expert_weights(p: torch.Tensor, settings: dict) -> dict[int, torch.Tensor]:
    """Expert → factor of its output, for the probabilities of one token."""
    if settings.get("soft"):
        return {e: p[e] for e in range(p.shape[0])}
    chosen = sorted(range(p.shape[0]), key=lambda e: -p[e].item())[: settings["top_k"]]
    total = sum(p[e] for e in chosen)
    is_normalized = settings.get("normalize_top_k", True) and len(chosen) > 1
    q = {e: p[e] / total if is_normalized else p[e] for e in chosen}
    if settings["gate_scale"] == "none":
        return {e: torch.ones_like(value) for e, value in q.items()}
    if settings["gate_scale"] == "straight_through":
        return {e: value / value.detach() for e, value in q.items()}
    return q


def adapted(linear: MoLELayer, u: torch.Tensor, weights: dict[int, torch.Tensor]) -> torch.Tensor:
    """W u + Σ_e w_e · s · B_e A_e u, for one token."""
    A, B = linear.mole_A["default"].weight, linear.mole_B["default"].weight
    result = linear.base_layer.weight @ u
    for expert, weight in weights.items():
        result = result + weight * (6 / 3) * (B[expert].T @ (A[expert] @ u))
    return result


def mlp_by_formula(mlp: torch.nn.Module, x: torch.Tensor, settings: dict) -> torch.Tensor:
    """LLaVA-MoLE, section 3.2, token by token."""
    router = mlp.gate_proj.mole_router["default"]
    rows = []
    for token in x.flatten(0, 1):
        logits = router.weight.double() @ token + router.bias.double()
        weights = expert_weights(torch.softmax(logits, dim=0), settings)
        gate = adapted(mlp.gate_proj, token, weights)
        up = adapted(mlp.up_proj, token, weights)
        rows.append(adapted(mlp.down_proj, torch.nn.functional.silu(gate) * up, weights))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("settings", GATES)
def test_mlp_and_its_gradients_are_those_of_the_formula(settings, top_k):
    settings = {"top_k": top_k, **settings}
    model = build(torch.float64, **settings)
    mlp = model.get_base_model().model.layers[0].mlp
    parameters = {name: p for name, p in mlp.named_parameters() if p.requires_grad}
    found, expected = [], []
    for results, function in ((found, mlp), (expected, lambda x: mlp_by_formula(mlp, x, settings))):
        x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad, *(p.grad for p in parameters.values())]
        model.zero_grad()
    for name, ours, theirs in zip(["output", "input", *parameters], found, expected, strict=True):
        if theirs is None or not theirs.any():
            assert ours is None or not ours.any(), name
        else:
            # routers compute in float32
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_fresh_adapter_leaves_the_output_as_it_is_to_the_bit():
    batch = token_batch()
    expected = tiny_llama()(**batch).logits
    model = get_peft_model(tiny_llama(), MoLEConfig(num_experts=4))
    assert torch.equal(model(**batch).logits, expected)


def test_one_expert_is_plain_lora():
    batch = token_batch()
    lora = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False))
    model = get_peft_model(
        tiny_llama(),
        MoLEConfig(
            num_experts=1, r=3, lora_alpha=6, lora_dropout=0.0, target_modules=LINEARS, lora_target_modules=None
        ),
    )
    for name, module in model.named_modules():
        if isinstance(module, MoLELayer):
            theirs = lora.get_submodule(name)
            module.mole_A["default"].weight.data = theirs.lora_A["default"].weight.data.clone().unsqueeze(0)
            module.mole_B["default"].weight.data = theirs.lora_B["default"].weight.data.T.clone().unsqueeze(0)
    assert not any("router" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(**batch).logits, lora(**batch).logits, rtol=1e-5, atol=1e-6)


def test_attention_gets_one_ordinary_lora():
    model = build()
    attention = model.get_base_model().model.layers[0].self_attn.q_proj
    assert attention.mole_A["default"].weight.shape == (1, 3, 32)
    assert "default" not in attention.mole_router
    assert "default" not in attention.scopes


def test_attention_is_left_alone_on_request():
    model = build(lora_target_modules=None)
    assert not isinstance(model.get_base_model().model.layers[0].self_attn.q_proj, MoLELayer)


@pytest.fixture
def plans(monkeypatch):
    """Every dispatch plan that a linear was computed with, in order."""
    seen = []
    original = lora_layer.lora_experts

    def spy(*args, plan, **kwargs):
        seen.append(plan)
        return original(*args, plan=plan, **kwargs)

    monkeypatch.setattr(lora_layer, "lora_experts", spy)
    return seen


def test_linears_of_an_mlp_share_one_plan(plans):
    build(lora_target_modules=None)(**token_batch())
    assert len(plans) == 6
    assert [len({id(plan) for plan in plans[i : i + 3]}) for i in (0, 3)] == [1, 1]
    assert plans[0] is not plans[3]


def test_module_scope_gives_each_linear_its_own_router(plans):
    model = build(lora_target_modules=None, router_scope="module")
    model(**token_batch())
    assert len({id(plan) for plan in plans}) == 6
    layers = [module for module in model.modules() if isinstance(module, MoLELayer)]
    assert all("default" in layer.mole_router for layer in layers)


def test_module_scope_routes_on_the_linear_s_own_input():
    model = build(router_scope="module", top_k=1, gate_scale="prob")
    down = model.get_base_model().model.layers[0].mlp.down_proj
    assert down.mole_router["default"].weight.shape == (4, 48)
    x = torch.randn(1, 5, 48)
    router = down.mole_router["default"]
    p = torch.softmax(x[0] @ router.weight.T + router.bias, dim=-1)
    expected = [adapted(down, x[0, t], {int(p[t].argmax()): p[t].max()}) for t in range(5)]
    torch.testing.assert_close(down(x)[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


def router_gradients(model) -> list[torch.Tensor | None]:
    return [p.grad for name, p in model.named_parameters() if "mole_router" in name]


def test_router_gets_no_gradient_from_the_task_without_gate_scale():
    model = build(gate_scale="none").train()
    model(**token_batch()).loss.backward()
    assert all(grad is None or not grad.any() for grad in router_gradients(model))


@pytest.mark.parametrize("settings", GATES[1:])
def test_router_gets_a_gradient_from_the_task(settings):
    model = build(**settings, top_k=1).train()
    if settings.get("normalize_top_k") is None:
        model(**token_batch()).loss.backward()
        assert all(grad.any() for grad in router_gradients(model))


def test_straight_through_changes_no_value():
    batch = token_batch()
    none = build(gate_scale="none")(**batch).logits
    assert torch.equal(none, build(gate_scale="straight_through")(**batch).logits)
    assert not torch.equal(none, build(gate_scale="prob")(**batch).logits)


def test_dropout_acts_on_experts_and_not_on_routers():
    model = build(lora_dropout=0.9).train()
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 7, 32)
    logits = []
    mlp.gate_proj.mole_router["default"].register_forward_hook(
        lambda _, __, output: logits.append(output.router_logits)
    )
    first, second = mlp(x), mlp(x)
    assert torch.equal(*logits)
    assert not torch.equal(first, second)


def test_soft_mixture_of_equal_experts_is_one_expert():
    model = build(soft=True, lora_target_modules=None)
    one = build(num_experts=1, lora_target_modules=None)
    for name, module in one.named_modules():
        if isinstance(module, MoLELayer):
            for container in ("mole_A", "mole_B"):
                weight = getattr(module, container)["default"].weight
                stacked = weight.detach().expand(4, -1, -1)
                getattr(model.get_submodule(name), container)["default"].weight.data = stacked.clone()
    batch = token_batch()
    torch.testing.assert_close(model(**batch).logits, one(**batch).logits, rtol=1e-5, atol=1e-5)


def test_order_of_experts_does_not_matter():
    batch = token_batch()
    model = build(top_k=2, gate_scale="prob")
    expected = model(**batch).logits
    order = torch.tensor([2, 0, 3, 1])
    for name, parameter in model.named_parameters():
        if "mole_" in name and parameter.shape[0] == 4:
            parameter.data = parameter.data[order].clone()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_experts_start_as_lora_does():
    model = build(init_lora_weights=True)
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    assert not layer.mole_B["default"].weight.any()
    A = layer.mole_A["default"].weight
    bound = 1 / math.sqrt(32)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(A[0], A[1])


def test_gaussian_init_has_the_width_of_lora():
    model = build(init_lora_weights="gaussian")
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    assert layer.mole_A["default"].weight.std().item() == pytest.approx(1 / 3, rel=0.15)
    assert not layer.mole_B["default"].weight.any()


def test_router_init_std_is_respected():
    model = build(router_init_std=0.5, num_experts=8)
    router = model.get_base_model().model.layers[0].mlp.gate_proj.mole_router["default"]
    assert router.weight.std().item() == pytest.approx(0.5, rel=0.15)
    assert not router.bias.any()


def test_router_without_bias():
    model = build(router_bias=False)
    assert not any(name.endswith("mole_router.default.bias") for name, _ in model.named_parameters())
    model(**token_batch()).loss.backward()


def test_published_settings_are_those_of_the_paper():
    config = MoLEConfig.paper()
    found = (config.num_experts, config.top_k, config.r, config.lora_alpha, config.gate_scale, config.soft)
    assert found == (3, 1, 32, 64, "none", False)


def test_released_code_is_a_dense_mixture():
    assert MoLEConfig.released_code().soft
    assert MoLEConfig.released_code(r=4).r == 4


def test_linears_called_out_of_order_are_refused():
    mlp = build().get_base_model().model.layers[0].mlp
    with pytest.raises(RuntimeError, match=r"called before it or twice.*router_scope=.module"):
        mlp.up_proj(torch.randn(1, 3, 32))


def test_linears_called_with_other_tokens_are_refused():
    mlp = build().get_base_model().model.layers[0].mlp
    mlp.gate_proj(torch.randn(1, 3, 32))
    with pytest.raises(RuntimeError, match=r"received 4 tokens.*routed 3.*router_scope=.module"):
        mlp.up_proj(torch.randn(1, 4, 32))


@pytest.mark.parametrize("where", ["base_layer", "mlp"])
def test_outputs_that_a_hook_keeps_are_not_overwritten(where):
    model = build()
    mlp = model.get_base_model().model.layers[0].mlp
    kept = []
    module = mlp.gate_proj.base_layer if where == "base_layer" else mlp.gate_proj
    module.register_forward_hook(lambda _, __, output: kept.append((output, output.detach().clone())))
    model(**token_batch()).loss.backward()
    (output, copy), *_ = kept
    assert torch.equal(output, copy)


def test_the_adapted_output_may_be_changed_in_place():
    model = build()
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    x = torch.randn(2, 3, 32)
    changed = layer(x)
    changed += 1
    changed.sum().backward()
    in_place = layer.mole_B["default"].weight.grad.clone()
    layer.mole_B["default"].weight.grad = None
    (layer(x) + 1).sum().backward()
    assert torch.equal(layer.mole_B["default"].weight.grad, in_place)
