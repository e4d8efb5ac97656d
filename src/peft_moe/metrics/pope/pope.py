"""POPE: does a model see objects that are not there? As a module for `evaluate`."""

import re

import datasets
import evaluate


DESCRIPTION = """
POPE asks "Is there a <object> in the image?" (Li et al., https://arxiv.org/abs/2305.10355) and scores the answers as a
binary classification in which "yes" is positive. An answer is read as yes or no from its first word, else from the
only one of the two that its first sentence contains ("not" means no). What is neither is wrong, counts as no "yes",
and is reported; the released script reads it as "yes".
"""

CITATION = """
@inproceedings{li2023pope,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle={EMNLP},
  year={2023}
}
"""

INPUTS = """
Args:
    predictions: list of generated answers (str).
    references: list of right answers, "yes" or "no" (str).
Returns:
    accuracy: share of right answers, in [0, 1].
    precision: share of the answers "yes" that are right; 0 where no answer is "yes".
    recall: share of the questions with "yes" that were answered so; 0 where there is none.
    f1: harmonic mean of precision and recall.
    yes_ratio: share of the answers "yes", in [0, 1].
    unparsed_ratio: share of the answers that are neither, in [0, 1].
"""


class POPE(evaluate.Metric):
    """Accuracy, precision, recall, F1 and the share of yes."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=datasets.Features(columns)
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        wanted = [reference.strip().lower() for reference in references]
        if wrong := sorted(set(wanted) - {"yes", "no"}):
            raise ValueError(f"References of POPE must be 'yes' or 'no', but found {wrong[:5]}.")
        given = [parse(prediction) for prediction in predictions]
        num_hits = sum(answer == label == "yes" for answer, label in zip(given, wanted))
        precision, recall = (_ratio(num_hits, answers.count("yes")) for answers in (given, wanted))
        return {
            "accuracy": _ratio(sum(answer == label for answer, label in zip(given, wanted)), len(wanted)),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "yes_ratio": _ratio(given.count("yes"), len(given)),
            "unparsed_ratio": _ratio(given.count(None), len(given)),
        }


def parse(answer: str) -> str | None:
    """`"yes"`, `"no"`, or `None` where an answer is neither.

    >>> [parse(answer) for answer in ("Yes, a dog.", "There is no dog", "A dog")]
    ['yes', 'no', None]
    """
    words = re.findall(r"[a-z']+", answer.strip().partition(".")[0].lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    says_yes, says_no = "yes" in words, any(word in ("no", "not") or word.endswith("n't") for word in words)
    if says_yes == says_no:
        return None
    return "yes" if says_yes else "no"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
