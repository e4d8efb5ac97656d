"""Modules for `evaluate` that load from a path, so they need no network."""

from pathlib import Path


FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The metrics of this package.

    >>> names()
    ['answer_nll', 'exact_match_by_domain', 'pope', 'vqa_accuracy']
    """
    return sorted(folder.name for folder in FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())


def path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    >>> import evaluate
    >>> exact_match = evaluate.load(path("exact_match_by_domain"))
    >>> exact_match.compute(predictions=["Yes."], references=["yes"], domains=["boolq"])["exact_match"]
    1.0

    Raises:
        ValueError: If there is no metric of this name.
    """
    if name not in names():
        raise ValueError(f"There is no metric {name!r} in peft_moe: choose from {names()}.")
    return str(FOLDER / name)
