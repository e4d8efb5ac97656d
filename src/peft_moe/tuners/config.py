"""What the configurations share: rules for their fields, and one error that names every field that breaks its rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

from .card import AdapterFacts, complete_model_card
from .registration import peft_type


CHECKPOINT_FORMAT = 1
FLOAT32_MAX = 3.4028234663852886e38

Rule = Callable[[str, Any], list[str]]
"""name and value of a field → sentences that say what is wrong with the value, and what it must be"""


def is_positive_int(value: Any) -> bool:
    """Whether a field counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a field can be calculated with in float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def is_names(value: Any) -> bool:
    """Whether a field is a list of names."""
    return isinstance(value, list | set | tuple) and all(isinstance(name, str) for name in value)


def must_be(words: str, is_met: Callable[[Any], bool]) -> Rule:
    """The rule that a value passes a test, and what the test asks for."""
    return lambda name, value: [] if is_met(value) else [f"{name} must be {words}, but is {value!r}."]


def by_name(words: str, is_met: Callable[[Any], bool]) -> Rule:
    """The rule for a dictionary from regular expressions, which select modules by name, to numbers."""

    def rule(name: str, value: Any) -> list[str]:
        if not isinstance(value, dict):
            return [f"{name} must be a dictionary from names to numbers, but is {value!r}."]
        number = must_be(words, is_met)
        return [
            sentence
            for key, entry in value.items()
            for sentence in (*number(f"{name}[{key!r}]", entry), *_broken(key, f"{name} has the key {key!r}"))
        ]

    return rule


def _broken(expression: Any, where: str) -> list[str]:
    try:
        re.compile(expression)
    except (re.error, TypeError) as error:
        return [f"{where}, which is no regular expression: {error}."]
    return []


def _names_or_expression(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return _broken(value, f"{name} is {value!r}")
    return must_be("a list of names", is_names)(name, value)


def _float32(name: str, value: Any) -> list[str]:
    if str(value).removeprefix("torch.") == "float32":
        return []
    return [
        f"{name} must be 'float32', but is {value!r}: a router in lower precision ties and flips experts. Leave the "
        "field out; the experts themselves follow the dtype of the model."
    ]


# What a field is annotated with; `bool`, `str` and `Literal` are rules by themselves. A rule needs a name: annotations
# are text that `get_type_hints` evaluates, and a lambda in such a text finds no name of its module.
Count = Annotated[int, must_be("a whole number of at least 1", is_positive_int)]
Positive = Annotated[float, must_be("a positive number", lambda value: is_number(value) and value > 0)]
NotNegative = Annotated[float, must_be("a number and not negative", lambda value: is_number(value) and value >= 0)]
Share = Annotated[float, must_be("in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)]
Names = Annotated[list[str], must_be("a list of names", is_names)]
Targets = Annotated[list[str] | str, _names_or_expression]
CountByName = Annotated[dict[str, int], by_name("at least 1", is_positive_int)]
PositiveByName = Annotated[dict[str, int], by_name("a positive number", lambda value: is_number(value) and value > 0)]
Float32 = Annotated[str, _float32]


@cache
def rules_of(config_cls: type[MoeTunerConfig]) -> dict[str, Rule]:
    """The rules of the fields of a configuration that PEFT does not know, by the names of the fields."""
    hints = get_type_hints(config_cls, include_extras=True)
    ours = {field.name for field in fields(config_cls)} - {field.name for field in fields(PeftConfig)}
    rules = {name: _rule_of(hints[name]) for name in hints if name in ours}
    return {name: rule for name, rule in rules.items() if rule is not None}


def _rule_of(hint: Any) -> Rule | None:
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    of_value = [alternative for alternative in alternatives if alternative is not NoneType]
    if len(of_value) > 1:
        return None
    kind, is_optional = of_value[0], len(alternatives) > 1
    if get_origin(kind) is Literal:
        choices = (None, *get_args(kind)) if is_optional else get_args(kind)
        return must_be(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)
    rule = kind.__metadata__[0] if get_origin(kind) is Annotated else RULES_OF_TYPES.get(kind)
    return (lambda name, value: [] if value is None else rule(name, value)) if rule and is_optional else rule


RULES_OF_TYPES = {
    bool: must_be("True or False", lambda value: isinstance(value, bool)),
    str: must_be("a text", lambda value: isinstance(value, str)),
}


class MoeTunerConfig(PeftConfig):
    """Mixin of the configurations: each field is checked by its annotation, and the model card of a saved adapter says
    what it is and how to load it.

    Raises:
        ValueError: fields do not make sense; all of them are named. Where each does by itself, fields contradict each
            other.
    """

    method: ClassVar[str]
    paper_url: ClassVar[str]
    card_fields: ClassVar[tuple[str, ...]] = ()
    """what the model card lists, in this order"""
    checkpoint_format: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method.upper())
        _check_checkpoint_format(self.checkpoint_format, method=self.method)
        for field in fields(self):
            if field.default_factory is dict and getattr(self, field.name) is None:
                setattr(self, field.name, {})
        rules = rules_of(type(self)).items()
        problems = [problem for name, rule in rules for problem in rule(name, getattr(self, name))]
        if problems := problems or self._contradictions():
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"{type(self).__name__} cannot be used:\n{listed}")

    def _contradictions(self) -> list[str]:
        """What is wrong with fields that make sense each by itself, in words that say what to do."""
        loss = (getattr(self, "router_aux_loss_scope", None), getattr(self, "router_aux_loss_type", None))
        if loss != ("global", "mole"):
            return []
        return [
            "router_aux_loss_scope='global' has no meaning with router_aux_loss_type='mole', which balances each "
            "sample by itself. Use 'switch' or 'pooled', or leave router_aux_loss_scope out."
        ]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, then complete the model card in the same folder, if there is one."""
        super().save_pretrained(save_directory, **kwargs)
        meaning = {field.name: field.metadata.get("help", "").rstrip(".") for field in fields(self)}
        settings = [(meaning[name], name, getattr(self, name)) for name in self.card_fields]
        task_type = str(getattr(self.task_type, "value", self.task_type))
        complete_model_card(save_directory, AdapterFacts(self.method, self.paper_url, task_type, settings))


def _check_checkpoint_format(found: int, *, method: str) -> None:
    if not is_positive_int(found):
        raise ValueError(
            f"checkpoint_format of a {method} adapter must be a whole number of at least 1, but is {found!r}. Leave "
            "it as it was saved."
        )
    if found > CHECKPOINT_FORMAT:
        raise ValueError(
            f"This {method} adapter has checkpoint format {found}, but this version of peft_moe reads up to "
            f"{CHECKPOINT_FORMAT}. It was written by a newer version: run `pip install --upgrade peft-moe`."
        )
