"""Our tuners are members of PEFT's enum like its own, and conflicts with other packages are named."""

from __future__ import annotations

import pickle

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_moe import MoCLEConfig, MoCLEModel, MoExtendConfig, MoExtendModel, MoLEConfig, MoLEModel
from peft_moe.tuners.registration import peft_type, register_tuner


TUNERS = {
    "MOLE": (MoLEConfig, MoLEModel),
    "MOCLE": (MoCLEConfig, MoCLEModel),
    "MOEXTEND": (MoExtendConfig, MoExtendModel),
}
every_tuner = pytest.mark.parametrize("name", TUNERS)


@every_tuner
def test_member_is_one_of_the_enum_in_every_way_that_an_enum_offers(name):
    member = PeftType(name)
    assert all(found is member for found in (PeftType[name], getattr(PeftType, name), PeftType.__members__[name]))
    assert [entry.name for entry in PeftType].count(name) == 1
    assert isinstance(member, PeftType) and isinstance(member, str) and member in PeftType
    assert member == member.name == member.value == name
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert str(member) == str(PeftType.LORA).replace("LORA", name)


@every_tuner
def test_member_and_config_survive_pickle(name):
    member = PeftType(name)
    assert pickle.loads(pickle.dumps(member)) is member
    config = TUNERS[name][0](r=4)
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(config)).peft_type is member


@every_tuner
def test_peft_knows_config_model_and_prefix(name):
    config, model = TUNERS[name]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)] is model
    # transformers rebuilds the prefix from the name
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(name)] == f"{name.lower()}_" == model.prefix
    assert config().peft_type is PeftType(name)


def test_members_of_peft_stay_as_they_are_and_unknown_ones_unknown():
    assert peft_type("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="NO_SUCH_TUNER"):
        PeftType("NO_SUCH_TUNER")


@every_tuner
def test_registering_again_changes_nothing(name):
    config, model = TUNERS[name]
    before = list(PeftType)
    register_tuner(name.lower(), config_cls=config, model_cls=model)
    assert list(PeftType) == before


def test_type_of_another_package_is_a_conflict():
    class ForeignConfig:
        pass

    with pytest.raises(RuntimeError, match=r"MOLE is already registered by peft_moe\..*MoLEConfig.*uninstall one"):
        register_tuner("mole", config_cls=ForeignConfig, model_cls=MoLEModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("MOLE")] is MoLEConfig


@pytest.fixture
def unregister():
    """Takes a member out of the enum again."""
    names = []
    yield names.append
    for name in names:
        member = PeftType._member_map_.pop(name)
        PeftType._value2member_map_.pop(name)
        PeftType._member_names_.remove(name)
        type.__delattr__(PeftType, name)
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(member, None)


def test_prefix_of_another_tuner_is_a_conflict(unregister, monkeypatch):
    unregister("TAKEN")
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LORA, "taken_")
    with pytest.raises(RuntimeError, match="prefix 'taken_' of TAKEN is already used by the PEFT type .*LORA"):
        register_tuner("taken", config_cls=MoLEConfig, model_cls=MoLEModel)


def test_a_member_that_peft_adds_later_is_not_added_twice(unregister):
    unregister("FUTURE")
    member = peft_type("FUTURE")
    assert peft_type("FUTURE") is member
    assert [entry.value for entry in PeftType].count("FUTURE") == 1
