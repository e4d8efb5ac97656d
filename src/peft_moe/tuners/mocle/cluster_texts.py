"""The texts that are clustered: from lists, columns and chats to instructions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .instructions import compile_instruction_pattern, instruction_text


PLACE_OF_INSTRUCTION = "{}"

Texts = Iterable[str | Sequence[Mapping[str, Any]]]


def read_instructions(texts: Any, instruction_pattern: str | None, *, rows: Sequence[int] | None = None) -> list[str]:
    """The instruction of each text; what has none is named by its index."""
    if isinstance(texts, (str, bytes, Mapping)) or hasattr(texts, "column_names"):
        hint = (
            "Give one of its columns, such as dataset['prompt']."
            if hasattr(texts, "column_names")
            else "Wrap it: [text]."
        )
        raise ValueError(f"A list of texts or chats is needed, but this is a single {type(texts).__name__}. {hint}")
    if not isinstance(texts, Iterable):
        raise ValueError(f"A list of texts or chats is needed, but this is a {type(texts).__name__}.")
    instructions = []
    for index, text in enumerate(texts):
        try:
            instructions.append(instruction_text(text, instruction_pattern=instruction_pattern))
        except ValueError as error:
            raise ValueError(f"Text {index if rows is None else rows[index]}: {error}") from error
    if not instructions:
        raise ValueError("There are no texts to cluster.")
    return instructions


def columns_of(dataset: Any, column: str | None, domain_column: str | None) -> tuple[Any, list[str] | None]:
    if isinstance(dataset, dict):
        raise ValueError(f"report takes one data set, but this has the splits {list(dataset)}. Give one of them.")
    if column is None:
        raise ValueError(f"column is missing: name the one of {dataset.column_names} that holds the texts.")
    for name in (column, domain_column):
        if name is not None:
            check_columns(dataset, name)
    return dataset[column], None if domain_column is None else [str(name) for name in dataset[domain_column]]


def check_columns(dataset: Any, column: str, output_column: str | None = None) -> None:
    names = dataset.column_names
    if names is None:
        # a stream of which nothing is known yet
        names = list(next(iter(dataset), {}))
    if column not in names:
        raise ValueError(f"The data set has no column {column!r}. Its columns are {names}.")
    if output_column in names:
        raise ValueError(
            f"The data set already has a column {output_column!r}. Remove it with "
            f"dataset.remove_columns({output_column!r}), or name another output_column."
        )


def check_texts_settings(template: str, instruction_pattern: str | None) -> None:
    if not isinstance(template, str) or template.count(PLACE_OF_INSTRUCTION) != 1:
        raise ValueError(
            f"template has to be a text with exactly one {PLACE_OF_INSTRUCTION!r}, where the instruction goes, but is "
            f"{template!r}."
        )
    if instruction_pattern is not None and not isinstance(instruction_pattern, str):
        raise ValueError(f"instruction_pattern has to be a text, but is a {type(instruction_pattern).__name__}.")
    compile_instruction_pattern(instruction_pattern)


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} has to be a whole number of at least {at_least}, but is {value!r}.")
