"""`TopKRouter`: choices, weights, precision, noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_moe.routing import TopKRouter, top_k_weights


@given(
    num_tokens=st.integers(0, 9),
    num_experts=st.integers(1, 7),
    data=st.data(),
    gate_scale=st.sampled_from(["none", "straight_through", "prob"]),
    normalize=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_choices_are_distinct_best_first_and_in_range(num_tokens, num_experts, data, gate_scale, normalize):
    top_k = data.draw(st.integers(1, num_experts))
    router = TopKRouter(5, num_experts, top_k=top_k, gate_scale=gate_scale, normalize_top_k=normalize)
    output = router(torch.randn(num_tokens, 5))
    assert output.router_logits.shape == (num_tokens, num_experts)
    assert output.top_k_index.shape == (num_tokens, top_k)
    assert (output.num_experts, output.top_k) == (num_experts, top_k)
    chosen = output.router_logits.gather(1, output.top_k_index)
    assert (chosen.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == top_k for row in output.top_k_index.tolist())
    if gate_scale == "none":
        assert output.top_k_weights is None
    elif gate_scale == "straight_through":
        assert torch.equal(output.top_k_weights, torch.ones(num_tokens, top_k))
    elif normalize and top_k > 1:
        torch.testing.assert_close(output.top_k_weights.sum(1), torch.ones(num_tokens))
    else:
        expected = output.router_logits.softmax(-1).gather(1, output.top_k_index)
        torch.testing.assert_close(output.top_k_weights, expected)


def test_normalising_a_single_choice_is_left_out():
    router = TopKRouter(5, 3, top_k=1, gate_scale="prob", normalize_top_k=True)
    output = router(torch.randn(6, 5))
    assert (output.top_k_weights < 1).all()


def test_soft_uses_every_expert_by_probability():
    router = TopKRouter(5, 3, top_k=1, gate_scale="none", soft=True)
    output = router(torch.randn(6, 5))
    assert output.top_k_index.tolist() == [[0, 1, 2]] * 6
    assert torch.equal(output.top_k_weights, output.router_logits.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_logits_are_float32_for_any_input(dtype):
    router = TopKRouter(8, 4)
    x = torch.randn(6, 8).to(dtype)
    output = router(x)
    assert output.router_logits.dtype == torch.float32
    assert torch.equal(output.router_logits, torch.nn.functional.linear(x.float(), router.weight, router.bias))


def test_logits_are_float32_under_autocast():
    router, x = TopKRouter(8, 4), torch.randn(6, 8)
    expected = router(x).router_logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).router_logits, expected)


def test_noise_is_for_training_only():
    router, x = TopKRouter(8, 4, jitter_noise=0.3), torch.randn(6, 8)
    router.train()
    assert not torch.equal(router(x).router_logits, router(x).router_logits)
    router.eval()
    assert torch.equal(router(x).router_logits, router(x).router_logits)


def test_noise_is_within_its_bounds():
    router = TopKRouter(8, 8, jitter_noise=0.25, bias=False).train()
    router.weight.data = torch.eye(8)
    logits = router(torch.ones(500, 8)).router_logits
    assert 0.75 <= logits.min() < 0.76
    assert 1.24 < logits.max() <= 1.25


def test_straight_through_has_the_gradient_of_p_over_detached_p():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(5, 3, dtype=torch.float64)
    weights = top_k_weights(torch.log_softmax(logits, -1), gate_scale="straight_through", normalize=False)
    (found,) = torch.autograd.grad((weights * factor).sum(), logits)
    p = logits.softmax(-1)
    (expected,) = torch.autograd.grad((p / p.detach() * factor).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_router_says_how_it_chooses():
    assert "top_k=2, gate_scale='prob', soft=False, bias=False" in repr(
        TopKRouter(8, 4, top_k=2, gate_scale="prob", bias=False)
    )
