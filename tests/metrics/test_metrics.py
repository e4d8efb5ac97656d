"""The `evaluate` modules, loaded from their folders as a user does, against values computed by hand."""

import evaluate
import pytest

from peft_moe import metrics


@pytest.fixture(scope="module")
def exact_match():
    return evaluate.load(metrics.path("exact_match_by_domain"))


@pytest.fixture(scope="module")
def answer_nll():
    return evaluate.load(metrics.path("answer_nll"))


@pytest.fixture(scope="module")
def vqa_accuracy():
    return evaluate.load(metrics.path("vqa_accuracy"))


@pytest.fixture(scope="module")
def pope():
    return evaluate.load(metrics.path("pope"))


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
    assert {"pope", "vqa_accuracy"} <= set(metrics.names())


def humans(**counts: int) -> list[str]:
    """Ten answers: `humans(red=4, blue=6)`."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    return answers


@pytest.mark.parametrize(
    ("num_agreeing", "left_out", "all_humans"),
    [
        pytest.param(0, 0.0, 0.0, id="nobody"),
        pytest.param(1, 0.3, 1 / 3, id="one: 9/10 of 1/3"),
        pytest.param(2, 0.6, 2 / 3, id="two: 2/10 of 1/3 and 8/10 of 2/3"),
        pytest.param(3, 0.9, 1.0, id="three: 3/10 of 2/3 and 7/10 of 1"),
        pytest.param(4, 1.0, 1.0, id="four are enough whoever is left out"),
        pytest.param(10, 1.0, 1.0, id="everybody"),
    ],
)
def test_an_answer_counts_by_the_humans_who_gave_it(vqa_accuracy, num_agreeing, left_out, all_humans):
    references = [humans(red=num_agreeing, blue=10 - num_agreeing)]
    result = vqa_accuracy.compute(predictions=["red"], references=references)
    assert result == {"vqa_accuracy": pytest.approx(left_out)}
    result = vqa_accuracy.compute(predictions=["red"], references=references, leave_one_out=False)
    assert result == {"vqa_accuracy": pytest.approx(all_humans)}


def test_questions_weigh_equally(vqa_accuracy):
    references = [humans(red=1, blue=9), humans(red=10), humans(blue=10)]
    result = vqa_accuracy.compute(predictions=["red"] * 3, references=references)
    assert result["vqa_accuracy"] == pytest.approx((0.3 + 1 + 0) / 3)


def test_one_reference_is_exact_match(vqa_accuracy):
    answers = {"predictions": ["Red.", "two", "circle"], "references": ["red", "2", "a square"]}
    assert vqa_accuracy.compute(**answers)["vqa_accuracy"] == pytest.approx(2 / 3)
    answers["references"] = [[reference] for reference in answers["references"]]
    assert vqa_accuracy.compute(**answers)["vqa_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        pytest.param("The Dog", "dog", 1.0, id="case and articles"),
        pytest.param("three", "3", 1.0, id="number words"),
        pytest.param("none", "0", 1.0, id="none is zero"),
        pytest.param("dont know", "don't know", 1.0, id="missing apostrophe"),
        pytest.param("couldn'tve", "couldnt've", 1.0, id="either of two apostrophes"),
        pytest.param("1,000", "1000", 1.0, id="grouped digits"),
        pytest.param("black-white", "black white", 1.0, id="a mark between words is a space"),
        pytest.param("black- white", "black white", 1.0, id="a mark beside a space vanishes"),
        pytest.param("2.5", "25", 0.0, id="a decimal point stays"),
        pytest.param("red.", "red", 1.0, id="a full stop vanishes"),
        pytest.param("red\n", "red", 1.0, id="line breaks"),
        pytest.param("Im", "I'm", 0.0, id="not in the official table once it is lower case"),
        pytest.param("it is red", "red", 0.0, id="a longer answer is another answer"),
        pytest.param("", "red", 0.0, id="an empty answer is wrong"),
    ],
)
def test_answers_are_normalised_as_officially(vqa_accuracy, prediction, reference, expected):
    assert vqa_accuracy.compute(predictions=[prediction], references=[reference]) == {"vqa_accuracy": expected}


def test_batches_of_questions_add_up(vqa_accuracy):
    vqa_accuracy.add_batch(predictions=["red"], references=[humans(red=10)])
    vqa_accuracy.add_batch(predictions=["red"], references=[humans(blue=10)])
    assert vqa_accuracy.compute() == {"vqa_accuracy": 0.5}


def test_a_question_without_reference_is_named(vqa_accuracy):
    with pytest.raises(ValueError, match="Question 1 has no reference"):
        vqa_accuracy.compute(predictions=["a", "b"], references=[["a"], []])


def test_pope_counts_by_hand(pope):
    result = pope.compute(
        predictions=["Yes, there is.", "No.", "yes", "There is no dog in the image.", "A dog.", "Yes", "no", "No"],
        references=["yes", "yes", "no", "no", "yes", "yes", "no", "no"],
    )
    # 3 times yes, 2 of them right; 4 questions with yes; right: 1, 4, 6, 7, 8
    assert result == {
        "accuracy": 5 / 8,
        "precision": 2 / 3,
        "recall": 2 / 4,
        "f1": pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)),
        "yes_ratio": 3 / 8,
        "unparsed_ratio": 1 / 8,
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param("YES!", "yes", id="case"),
        pytest.param("I think yes", "yes", id="later word"),
        pytest.param("There isn't any", "no", id="contraction"),
        pytest.param("It is not there. Yes.", "no", id="first sentence"),
        pytest.param("No, yes", "no", id="first word"),
        pytest.param("maybe yes, maybe no", None, id="both"),
        pytest.param("nothing", None, id="another word that begins alike"),
        pytest.param("", None, id="empty"),
    ],
)
def test_answers_are_read_as_yes_or_no(pope, answer, expected):
    result = pope.compute(predictions=[answer], references=["yes"])
    assert (result["yes_ratio"], result["unparsed_ratio"]) == (float(expected == "yes"), float(expected is None))


def test_pope_without_a_yes_divides_by_nothing(pope):
    result = pope.compute(predictions=["no", "no"], references=["no", "No"])
    assert result["accuracy"] == 1.0
    assert result["precision"] == result["recall"] == result["f1"] == 0.0


def test_pope_refuses_other_references(pope):
    with pytest.raises(ValueError, match=r"must be 'yes' or 'no', but found \['dog'\]"):
        pope.compute(predictions=["yes"], references=["dog"])
