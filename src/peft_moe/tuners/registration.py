"""The only file that touches PEFT's registry. PEFT finds tuners by the members of its `PeftType` enum."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import register_peft_method


def peft_type(name: str) -> PeftType:
    """Return `PeftType.<name>`, adding the member if PEFT does not have it (yet).

    PEFT offers `register_peft_method` for tuners but no way to add a member, and a plain string fails in several
    places that read `.value`. The member is built as `enum` itself builds one.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register_tuner(name: str, *, config_cls: type[Any], model_cls: type[Any]) -> None:
    """Make a tuner known to PEFT under `name` (lower case). Calling it again with the same classes does nothing.

    Raises:
        RuntimeError: another package has registered the name or its prefix.
    """
    member = peft_type(name.upper())
    prefix = f"{name}_"
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is config_cls:
        return
    if registered is not None:
        raise RuntimeError(
            f"The PEFT type {name.upper()} is already registered by "
            f"{registered.__module__}.{registered.__qualname__}. peft_moe cannot be imported beside it; uninstall one "
            "of the two packages."
        )
    taken = [str(other) for other, used in PEFT_TYPE_TO_PREFIX_MAPPING.items() if used == prefix]
    if taken:
        raise RuntimeError(f"The prefix {prefix!r} of {name.upper()} is already used by the PEFT type {taken[0]}.")
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
