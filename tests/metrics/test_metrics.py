"""The `evaluate` modules, loaded from their folders as a user does."""

import evaluate
import pytest

from peft_moe import metrics


@pytest.fixture(scope="module")
def exact_match():
    return evaluate.load(metrics.path("exact_match_by_domain"))


@pytest.fixture(scope="module")
def answer_nll():
    return evaluate.load(metrics.path("answer_nll"))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        pytest.param("Yes.", "yes", 1.0, id="case and trailing punctuation do not count"),
        pytest.param(" the  answer\nis", "The answer is.", 1.0, id="whitespace does not count"),
        pytest.param("yes, it is", "yes", 0.0, id="a longer answer is another answer"),
        pytest.param("", "no", 0.0, id="an empty prediction is wrong"),
        pytest.param("B", "B. refrigerator", 1.0, id="the letter is enough"),
        pytest.param("(b) oven", "B. refrigerator", 1.0, id="only the letter is compared"),
        pytest.param("C. refrigerator", "B. refrigerator", 0.0, id="another letter is wrong"),
        pytest.param("a refrigerator", "A. refrigerator", 0.0, id="an article is no option letter"),
        pytest.param("refrigerator", "B. refrigerator", 0.0, id="the text without the letter is wrong"),
    ],
)
def test_an_answer_matches(exact_match, prediction, reference, expected):
    result = exact_match.compute(predictions=[prediction], references=[reference], domains=["any"])
    assert result == {"exact_match": expected, "exact_match_any": expected}


def test_exact_match_weighs_domains_equally(exact_match):
    result = exact_match.compute(
        predictions=["yes", "yes", "yes", "A"], references=["yes", "yes", "yes", "B. no"], domains=["x", "x", "x", "y"]
    )
    assert result == {"exact_match": 0.5, "exact_match_x": 1.0, "exact_match_y": 0.0}


def test_answer_nll_weighs_tokens_within_a_domain_and_domains_equally(answer_nll):
    result = answer_nll.compute(predictions=[1.0, 5.0, 4.0], references=[1, 2, 1], domains=["x", "x", "y"])
    assert result == {"answer_nll": 3.0, "answer_nll_x": 2.0, "answer_nll_y": 4.0}


def test_answer_nll_names_a_domain_without_answer_tokens(answer_nll):
    with pytest.raises(ValueError, match=r"No answer tokens in domains \['x'\]"):
        answer_nll.compute(predictions=[0.0], references=[0], domains=["x"])


def test_batches_add_up(answer_nll):
    answer_nll.add_batch(predictions=[1.0], references=[1], domains=["x"])
    answer_nll.add_batch(predictions=[3.0], references=[1], domains=["x"])
    assert answer_nll.compute()["answer_nll"] == 2.0


def test_an_unknown_metric_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no metric 'bleu'.*answer_nll"):
        metrics.path("bleu")
