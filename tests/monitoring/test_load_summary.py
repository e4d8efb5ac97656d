"""The summary numbers, on counts whose answer is known."""

from __future__ import annotations

import math

import pytest

from peft_moe.monitoring import summarize_load
from peft_moe.monitoring.summary import load_shares, normalized_entropy, num_dead


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([7, 7, 7], 1.0, id="balanced"),
        pytest.param([9, 0, 0], 0.0, id="one-expert"),
        pytest.param([5, 5, 0, 0], 0.5, id="half-of-the-experts"),
        pytest.param([4], 1.0, id="only-one"),
        pytest.param([0, 0], math.nan, id="nothing-counted"),
    ],
)
def test_normalized_entropy(counts, expected):
    assert normalized_entropy(counts) == pytest.approx(expected, nan_ok=True)


def test_an_expert_below_one_percent_of_the_balanced_share_is_dead():
    # E = 4, 4000 choices: balanced is 1000, one percent of it is 10
    assert num_dead([3980, 10, 10, 0]) == 1
    assert num_dead([3981, 10, 9, 0]) == 2


def test_dead_threshold_can_be_chosen():
    assert num_dead([60, 40, 20, 0], dead_threshold=1.0) == 2
    assert num_dead([60, 40, 20, 0], dead_threshold=0.0) == 1


def test_shares_of_nothing_are_zero():
    assert load_shares([0, 0]) == [0.0, 0.0]


def test_summary_is_a_mean_over_routers_that_saw_tokens():
    summary = summarize_load({"a": [8, 0], "b": [4, 4], "never_called": [0, 0]})
    assert summary.entropy == pytest.approx(0.5)
    assert (summary.max_share, summary.busiest_router, summary.busiest_expert) == (1.0, "a", 0)
    assert (summary.num_dead_experts, summary.num_experts, summary.dead_fraction) == (1, 4, 0.25)


def test_summary_of_nothing_is_none():
    assert summarize_load({}) is None
    assert summarize_load({"a": [0, 0]}) is None
