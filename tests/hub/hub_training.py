"""The training that one process begins and another one goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from conformance.tuner_cases import CASES, TunerCase


def case() -> TunerCase:
    """The adapter that is trained."""
    return next(case for case in CASES if case.name == "mole-top-2-weighted")


def rows() -> list[dict[str, Any]]:
    """The data set."""
    return [{name: value[i] for name, value in case().batch(4).items()} for i in range(4)]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Four steps, with a checkpoint after two."""
    return TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        **settings,
    )
