"""Routing of MoeLlava against the formulas of the paper and of the released code, restated here without our code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from models.tiny_llava import image_batch, labels_of, llava_fields, sparse_llava
from peft_moe import aux_loss
from peft_moe.models import MoeLlavaConfig
from peft_moe.models.moe_llava.routing import (
    MoeLlavaTopKRouter,
    expert_capacity,
    load_balancing_loss,
    router_z_loss,
    within_capacity,
)
from peft_moe.routing import TopKRouter
from peft_moe.routing_recorder import routing_statistics


def router_of(hidden_size: int = 8, num_experts: int = 4, **fields) -> MoeLlavaTopKRouter:
    config = MoeLlavaConfig(**llava_fields(), num_experts=num_experts, **fields)
    router = MoeLlavaTopKRouter(config, hidden_size, num_experts)
    torch.nn.init.normal_(router.weight)
    return router.eval()


def token_output(token, block, *, top_k, use_residual, normalize) -> torch.Tensor:
    """Equations 4 to 6 of the paper for one token and a gated MLP; renormalised as the released code does."""
    probabilities = torch.softmax(block.gate.weight.float() @ token, dim=0)
    best = sorted(range(len(probabilities)), key=lambda e: -float(probabilities[e].detach()))[:top_k]
    total = sum(probabilities[e] for e in best)
    output = torch.zeros_like(token)
    for expert in best:
        gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
        weight = probabilities[expert]
        if normalize:
            weight = weight / (total if top_k > 1 else weight.detach())
        output = output + weight * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
    if use_residual:
        a, b = torch.softmax(block.residual_gate.weight @ token + block.residual_gate.bias, dim=0)
        mlp = block.residual_mlp
        inner = F.silu(mlp.gate_proj.weight @ token) * (mlp.up_proj.weight @ token)
        output = a * output + b * (mlp.down_proj.weight @ inner)
    return output


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 2},
        {"num_experts_per_tok": 3, "num_experts": 3},
        {"num_experts_per_tok": 2, "norm_topk_prob": False},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 2, "use_residual": True},
    ],
    ids=["top-1", "top-2", "all", "top-2-unnormalised", "top-1-unnormalised", "residual"],
)
def test_block_is_the_formula_for_each_token(fields, implementation):
    sparse = sparse_llava(**fields)
    sparse.set_experts_implementation(implementation)
    block = sparse.model.language_model.layers[0].mlp
    torch.manual_seed(2)
    hidden_states, upstream = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
    inputs = [hidden_states, *block.parameters()]
    found = block(hidden_states)
    found_gradients = torch.autograd.grad(found, inputs, upstream)
    options = {
        "top_k": fields["num_experts_per_tok"],
        "use_residual": fields.get("use_residual", False),
        "normalize": fields.get("norm_topk_prob", True),
    }
    rows = [token_output(token, block, **options) for token in hidden_states.reshape(-1, 32)]
    expected = torch.stack(rows).view_as(hidden_states)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def original_gate(logits, capacity_factor, min_capacity=0):
    """The top-2 gate of the released code without its noise, one decision after the other."""
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(-1)
    capacity = max(min_capacity, math.ceil(num_tokens / num_experts * capacity_factor * 2))
    first = [int(row.argmax()) for row in probabilities]
    second = []
    for token, row in enumerate(probabilities):
        others = row.clone()
        others[first[token]] = -1
        second.append(int(others.argmax()))
    weights = torch.zeros(num_tokens, num_experts)
    seen_first, seen_second = [0] * num_experts, [first.count(e) for e in range(num_experts)]
    for token in range(num_tokens):
        kept = {}
        if seen_first[first[token]] < capacity:
            kept[first[token]] = float(probabilities[token, first[token]])
        if seen_second[second[token]] < capacity:
            kept[second[token]] = float(probabilities[token, second[token]])
        seen_first[first[token]] += 1
        seen_second[second[token]] += 1
        total = max(sum(kept.values()), torch.finfo(torch.float32).eps)
        for expert, weight in kept.items():
            weights[token, expert] = weight / total
    share = torch.tensor([first.count(e) / num_tokens for e in range(num_experts)])
    return weights, num_experts * float((probabilities.mean(0) * share).sum()), capacity


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 32), (1.5, 48), (2.0, 64)])
def test_capacity_is_that_of_the_original(factor, capacity):
    found = expert_capacity(64, num_experts=4, top_k=2, factor=factor, minimum=0)
    assert found == capacity
    assert original_gate(torch.zeros(64, 4), factor)[2] == capacity


@pytest.mark.parametrize("num_experts", [2, 3, 4, 5, 7, 8])
def test_capacity_rounds_up_only_where_there_is_a_remainder(num_experts):
    for num_tokens in range(1, 200):
        # in tenths, so that the expected value is exact
        expected = -(-num_tokens * 2 * 12 // (10 * num_experts))
        found = expert_capacity(num_tokens, num_experts=num_experts, top_k=2, factor=1.2, minimum=0)
        assert found == expected, num_tokens


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("skew", [0.0, 2.0], ids=["even", "skewed"])
def test_gate_equals_the_original(factor, skew):
    router = router_of(router_drop="position", router_eval_capacity_factor=factor)
    hidden_states = torch.randn(64, 8)
    with torch.no_grad():
        router.weight[0] += skew * hidden_states.mean(0)
    logits, weights, index = router(hidden_states)
    found = torch.zeros(64, 4).scatter(1, index, weights)
    expected, aux_loss, _ = original_gate(logits.detach(), factor)
    torch.testing.assert_close(found, expected)
    assert (found > 0).sum() < 128 or factor > 1
    found_loss = load_balancing_loss([logits, logits], top_k=2, loss_type="moe_llava")
    # one term per layer, added up
    assert found_loss.item() == pytest.approx(2 * aux_loss, rel=1e-5)


def test_position_keeps_the_earliest_and_probability_the_surest():
    index = torch.zeros(6, 1, dtype=torch.long)
    kept = within_capacity(index, 2, num_experts=4)
    assert kept.squeeze(1).tolist() == [True, True, False, False, False, False]
    priority = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.4])
    kept = within_capacity(index, 2, num_experts=4, priority=priority)
    assert kept.squeeze(1).tolist() == [False, True, False, True, False, False]


def test_router_drops_the_least_probable_tokens():
    router = router_of(num_experts_per_tok=1, router_drop="probability", router_eval_capacity_factor=0.5)
    logits, weights, index = router(torch.randn(64, 8))
    surest = logits.softmax(-1).max(-1).values
    num_dropped = 0
    for expert in range(4):
        mine = index[:, 0] == expert
        kept, dropped = surest[mine & (weights[:, 0] > 0)], surest[mine & (weights[:, 0] == 0)]
        # 64 tokens, 4 experts, half of what an even spread needs
        assert len(kept) == min(8, int(mine.sum()))
        assert not len(dropped) or kept.min() >= dropped.max()
        num_dropped += len(dropped)
    assert num_dropped > 0


def test_first_choices_of_all_tokens_come_before_second_choices():
    index = torch.tensor([[0, 1], [1, 0]])
    kept = within_capacity(index, 1, num_experts=2)
    assert kept.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("num_padding", [0, 3])
def test_capacity_counts_padding_like_any_token_as_the_original_does(num_padding):
    fields = {"moe_layers": [0], "router_drop": "position", "router_eval_capacity_factor": 0.5}
    sparse = sparse_llava(**fields)
    seen = []
    gate = sparse.model.language_model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, output: seen.append(output))
    batch = image_batch(num_padding=num_padding)
    # the embedding of the padding token is 0, for which all experts are equally good
    sparse(**{**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 0, 7)})
    ((logits, weights, index),) = seen
    assert len(logits) == 2 * (11 + num_padding)
    expected, _, _ = original_gate(logits.detach(), 0.5)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, index, weights), expected)
    assert (weights == 0).any()


def test_losses_in_generation_do_not_count_padding():
    sparse = sparse_llava(output_router_logits=True)
    batch, losses = image_batch(num_padding=3), []
    sparse.register_forward_hook(lambda module, args, output: losses.append(output.aux_loss))
    sparse.generate(**batch, max_new_tokens=1, do_sample=False)
    torch.testing.assert_close(losses[0], sparse(**batch, labels=labels_of(batch)).aux_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss_type", "value"), [("switch", 2.0), ("pooled", 2.0), ("moe_llava", 3.0)])
def test_balance_loss_of_uniform_routers(loss_type, value):
    # three layers with equal probabilities, tokens spread evenly by a hair
    logits = 1e-5 * torch.eye(4).repeat(4, 1)
    logits = logits + 1e-6 * torch.eye(4).roll(1, 1).repeat(4, 1)
    loss = load_balancing_loss([logits] * 3, top_k=2, loss_type=loss_type)
    assert float(loss) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_pooled_loss_is_that_of_transformers(masked):
    logits = [torch.randn(12, 4) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]) if masked else None
    expected = load_balancing_loss_func(tuple(logits), 4, 2, mask)
    found = load_balancing_loss(logits, top_k=2, loss_type="pooled", token_mask=mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_type", ["switch", "pooled", "moe_llava"])
def test_padding_does_not_change_the_losses(loss_type):
    fields = {"router_aux_loss_type": loss_type, "router_z_loss_coef": 0.1}
    sparse = sparse_llava(**fields)
    batch = image_batch(num_padding=0)
    padded = image_batch(num_padding=3)
    # the first sample of the padded batch has no padding, so that only the last one can be compared
    last = {name: value[-1:] for name, value in batch.items()}
    padded = {name: value[-1:] for name, value in padded.items()}
    padded["input_ids"][:, 3:] = last["input_ids"]
    padded["pixel_values"] = last["pixel_values"]
    position_ids = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = sparse(**last, output_router_logits=True)
    found = sparse(**padded, position_ids=position_ids, output_router_logits=True)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.z_loss, expected.z_loss, rtol=1e-5, atol=1e-6)
    assert len(found.router_logits[0]) > len(expected.router_logits[0])


# a saved model carries its own code, which may not import that of the tuners: what stands twice has to be equal
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_losses_equal_those_of_the_tuners(masked):
    logits = [torch.randn(12, 4) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]) if masked else None
    statistics = [routing_statistics(layer, layer.topk(2).indices, mask) for layer in logits]
    for loss_type in ("switch", "pooled"):
        found = load_balancing_loss(logits, top_k=2, loss_type=loss_type, token_mask=mask)
        torch.testing.assert_close(found, aux_loss.load_balancing_loss(statistics, loss_type=loss_type))
    torch.testing.assert_close(router_z_loss(logits, token_mask=mask), aux_loss.router_z_loss(statistics))


@pytest.mark.parametrize(
    ("top_k", "norm_topk_prob", "gate_scale"),
    [(1, True, "straight_through"), (2, True, "prob"), (1, False, "prob"), (2, False, "prob")],
)
def test_router_equals_that_of_the_tuners(top_k, norm_topk_prob, gate_scale):
    router = router_of(num_experts_per_tok=top_k, norm_topk_prob=norm_topk_prob)
    other = TopKRouter(8, 4, top_k=top_k, bias=False, gate_scale=gate_scale, normalize_top_k=norm_topk_prob)
    other.load_state_dict(router.state_dict())
    tokens = torch.randn(6, 8)
    logits, weights, index = router(tokens)
    expected = other(tokens)
    assert torch.equal(logits, expected.router_logits) and torch.equal(index, expected.top_k_index)
    torch.testing.assert_close(weights, expected.top_k_weights)
    (found,) = torch.autograd.grad(weights.square().sum(), router.weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected.top_k_weights.square().sum(), other.weight)[0])


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = [torch.randn(6, 4), torch.randn(6, 4)]
    expected = sum(float(torch.logsumexp(row, 0)) ** 2 for layer in logits for row in layer) / 12
    assert float(router_z_loss(logits)) == pytest.approx(expected, rel=1e-5)


def test_single_expert_weighs_one_and_learns_from_its_probability():
    router = router_of(num_experts_per_tok=1)
    tokens = torch.randn(5, 8)
    logits, weights, index = router(tokens)
    assert torch.equal(weights, torch.ones(5, 1))
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    log_probability = logits.log_softmax(-1).gather(1, index).sum()
    (expected,) = torch.autograd.grad(log_probability, logits)
    torch.testing.assert_close(gradient, expected)


def test_evaluation_is_deterministic_and_training_samples():
    router = router_of(router_second_expert="gumbel", router_jitter_noise=0.1)
    tokens = torch.randn(256, 8)
    assert all(torch.equal(one, other) for one, other in zip(router(tokens), router(tokens), strict=True))
    assert torch.equal(router(tokens)[2], torch.topk(router(tokens)[0], 2).indices)
    router.train()
    assert not torch.equal(router(tokens)[0], router(tokens)[0])


def test_gumbel_samples_the_second_expert_by_its_probability():
    router = router_of(router_second_expert="gumbel").train()
    token = torch.randn(1, 8)
    logits, _, index = router(token.expand(20000, 8))
    first = int(logits[0].argmax())
    assert (index[:, 0] == first).all()
    assert (index[:, 1] != first).all()
    probabilities = logits[0].softmax(-1).detach()
    probabilities[first] = 0
    shares = torch.bincount(index[:, 1], minlength=4) / len(index)
    torch.testing.assert_close(shares, probabilities / probabilities.sum(), atol=0.02, rtol=0)


def test_router_computes_in_float32_whatever_the_model():
    router = router_of().to(torch.bfloat16)
    tokens = torch.randn(6, 8).to(torch.bfloat16)
    expected = F.linear(tokens.float(), router.weight)
    assert router.weight.dtype == torch.float32
    assert torch.equal(router(tokens)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(tokens)[0], expected)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_router_keeps_its_dtype_only_against_narrowing(narrow):
    router = router_of()
    expected = router.weight.detach().clone()
    assert torch.equal(router.to(narrow).weight, expected)
    wide = router.double()
    assert wide.weight.dtype == torch.float64
    assert wide(torch.randn(3, 8, dtype=torch.float64))[0].dtype == torch.float64
    assert torch.equal(router.float().weight, expected)
    assert torch.equal(router.double().to(narrow).weight, expected)
    router.load_state_dict({"weight": expected.to(narrow)}, assign=True)
    assert router.weight.dtype == narrow
    assert router(torch.randn(3, 8, dtype=narrow))[0].dtype == torch.float32
    assert router.float().weight.dtype == torch.float32


def test_no_token_has_a_say_in_the_routing_of_another():
    sparse = sparse_llava()
    block = sparse.model.language_model.layers[0].mlp
    hidden_states = torch.randn(1, 9, 32)
    with torch.no_grad():
        together = block(hidden_states)
        alone = torch.cat([block(token) for token in hidden_states.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_batches_of_three_are_like_any_other():
    # the released code takes the output of a dense layer for that of a mixture if the batch has three samples
    sparse = sparse_llava()
    batch = image_batch(3)
    with torch.no_grad():
        together = sparse(**batch, labels=labels_of(batch)).logits
        alone = torch.cat([sparse(**{k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
