"""VQA accuracy with the official normalisation of answers, as a module for `evaluate`."""

import re

import datasets
import evaluate


DESCRIPTION = """
Accuracy of visual question answering (Antol et al., https://arxiv.org/abs/1505.00468). With several human answers to a
question, an answer counts min(number of humans who gave it / 3, 1); as in the official evaluation, this is averaged
over all ways to leave one human out. With one reference it is exact match. Answers are always normalised as in the
official evaluation (VQAv2, TextVQA): case, punctuation, articles, number words and missing apostrophes do not count.
The script of VQAv2 skips that where all humans wrote the same; here it is done there too.
"""

CITATION = """
@inproceedings{antol2015vqa,
  title={{VQA}: Visual Question Answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and Zitnick,
  C.
          Lawrence and Parikh, Devi},
  booktitle={ICCV},
  year={2015}
}
"""

INPUTS = """
Args:
    predictions: list of generated answers (str).
    references: for each question its human answers (list of str; VQAv2 has ten), or its one right answer (str).
    leave_one_out: average over all ways to leave one human out (bool, default True, the official evaluation);
        False takes min(humans / 3, 1) over all of them. Without effect on questions with one reference.
Returns:
    vqa_accuracy: mean over questions, in [0, 1].
"""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


# the last entry is turned around in the official table, too
CONTRACTIONS = {wrong: word for word in WITH_APOSTROPHES.split() for wrong in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


class VQAAccuracy(evaluate.Metric):
    """Accuracy against one or several human answers per question."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        several = datasets.Features({"predictions": text, "references": datasets.List(text)})
        one = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=[several, one]
        )

    def _compute(
        self, predictions: list[str], references: list[str] | list[list[str]], leave_one_out: bool = True
    ) -> dict[str, float]:
        scores = []
        for index, (prediction, answers) in enumerate(zip(predictions, references)):
            answers = [answers] if isinstance(answers, str) else answers
            if not answers:
                raise ValueError(f"Question {index} has no reference. Give at least one answer for each question.")
            scores.append(score(prediction, answers, leave_one_out=leave_one_out))
        return {"vqa_accuracy": sum(scores) / len(scores)}


def score(prediction: str, answers: list[str], *, leave_one_out: bool = True) -> float:
    """What one prediction counts, in [0, 1]."""
    given = normalize(prediction)
    agrees = [normalize(answer) == given for answer in answers]
    if len(agrees) == 1:
        return float(agrees[0])
    num_agreeing = sum(agrees)
    if not leave_one_out:
        return min(num_agreeing / 3, 1.0)
    return sum(min((num_agreeing - left_out) / 3, 1.0) for left_out in agrees) / len(agrees)


def normalize(answer: str) -> str:
    """An answer as the official evaluation compares it.

    >>> normalize("The two dogs.")
    '2 dogs'
    """
    answer = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBER_WORDS.get(word, word) for word in answer.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(answer: str) -> str:
    """A mark beside a space, or any mark where digits are grouped by commas, vanishes; others become spaces."""
    has_grouped_digits = COMMA_IN_NUMBER.search(answer) is not None
    result = answer
    for mark in PUNCTUATION:
        vanishes = has_grouped_digits or f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if vanishes else " ")
    return PERIOD_BEFORE_NO_DIGIT.sub("", result)
