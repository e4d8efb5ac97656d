"""An adapter that is not what it should be is refused with the cause, or loads as it was saved. Never a part of it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from trained import FUZZ

from conformance.tuner_cases import CASES, TunerCase


Change = Callable[[Path], object]
WEIGHTS = "adapter_model.safetensors"
NO_FIT = "The saved weights do not fit the adapter 'default': .*{}.*Nothing was loaded"
ONE_PER_TUNER = list({case.tuner: case for case in reversed(CASES)}.values())
one_case_per_tuner = pytest.mark.parametrize("case", ONE_PER_TUNER, ids=lambda case: case.tuner)
EXHAUSTIVE = (pytest.mark.exhaustive, pytest.mark.slow)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A good adapter of each case, in a folder of its name."""
    root = tmp_path_factory.mktemp("saved")
    for case in CASES:
        case.wrap().save_pretrained(root / case.name)
    return {folder.name: folder for folder in root.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def with_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """A change of what the file of weights holds."""

    def change(folder: Path) -> None:
        tensors = tensors_of(folder)
        edit(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def with_bytes(edit: Callable[[bytes], bytes], name: str = WEIGHTS) -> Change:
    """A change of the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def with_fields(**fields: Any) -> Change:
    """Other fields in adapter_config.json."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def to_dtype(dtype: torch.dtype) -> Change:
    return with_tensors(lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))


def first_becomes(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        tensors[name] = make(tensors[name])

    return with_tensors(edit)


def of_lora(folder: Path) -> None:
    """The same tensors by the names of another method."""
    names = {name: re.sub("(mole|mocle|moextend)_", "lora_", name) for name in tensors_of(folder)}
    with_tensors(lambda tensors: [tensors.update({new: tensors.pop(old)}) for old, new in names.items()])(folder)


def of_a_deeper_model(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if ".layers.2." in name)
    tensors[name.replace(".layers.2.", ".layers.9.")] = tensors[name].clone()


REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    # PEFT reads the file: the messages are those of safetensors, which knows no name
    "cut": (with_bytes(lambda content: content[:-1]), safetensors.SafetensorError, "(?i)incomplete"),
    "too long": (with_bytes(lambda content: content + b"\0"), safetensors.SafetensorError, "(?i)not fully covered"),
    "empty": (with_bytes(lambda content: b""), safetensors.SafetensorError, "(?i)header"),
    "zeros": (with_bytes(lambda content: bytes(len(content))), safetensors.SafetensorError, "(?i)header"),
    "a huge header": (with_bytes(lambda content: b"\xff" * 8 + content), safetensors.SafetensorError, "(?i)header"),
    "a pickle": (with_bytes(lambda content: pickle.dumps({})), safetensors.SafetensorError, "(?i)header"),
    # these are ours
    "a tensor missing": (with_tensors(lambda t: t.pop(min(t))), ValueError, NO_FIT.format("1 tensors are missing")),
    "no tensors": (with_tensors(lambda t: t.clear()), ValueError, NO_FIT.format("are missing")),
    "a tensor too many": (with_tensors(of_a_deeper_model), ValueError, NO_FIT.format("no place in the model")),
    "another shape": (
        first_becomes(lambda t: t[..., :1].clone()),
        ValueError,
        NO_FIT.format("1 tensors have another"),
    ),
    "another rank": (first_becomes(lambda t: t.unsqueeze(0).clone()), ValueError, NO_FIT.format("another shape")),
    "a scalar": (first_becomes(lambda t: torch.tensor(1.0)), ValueError, NO_FIT.format("another shape")),
    "another method": (of_lora, ValueError, NO_FIT.format("are missing")),
    "whole numbers": (to_dtype(torch.int32), ValueError, NO_FIT.format("dtype that cannot be converted.*int32")),
    "truth values": (to_dtype(torch.bool), ValueError, NO_FIT.format("dtype that cannot be converted.*bool")),
    "complex numbers": (to_dtype(torch.complex64), ValueError, NO_FIT.format("dtype that cannot be converted")),
    "nan": (first_becomes(lambda t: t.fill_(float("nan"))), ValueError, NO_FIT.format("1 tensors hold NaN or inf")),
    "infinity": (first_becomes(lambda t: t.fill_(-float("inf"))), ValueError, NO_FIT.format("1 tensors hold NaN")),
    "a later format": (with_fields(checkpoint_format=2), ValueError, "pip install --upgrade"),
    "a format in words": (
        with_fields(checkpoint_format="1"),
        ValueError,
        "checkpoint_format of a .* must be a whole n",
    ),
    "no format": (with_fields(checkpoint_format=None), ValueError, "checkpoint_format of a .* but is None"),
    "a rank in words": (with_fields(r="2"), ValueError, "r must be a whole number of at least 1, but is '2'"),
    # PEFT reads the configuration before it knows whose it is
    "no json": (with_bytes(lambda content: content[:20], "adapter_config.json"), ValueError, "Unterminated|Expecting"),
    "no text": (with_bytes(lambda content: b"\xff\xfe", "adapter_config.json"), ValueError, "codec"),
    "a list": (with_bytes(lambda content: b"[]", "adapter_config.json"), TypeError, "list indices"),
    "no fields": (with_bytes(lambda content: b"{}", "adapter_config.json"), KeyError, "peft_type"),
    "an unknown type": (with_fields(peft_type="MOLEX"), KeyError, "MOLEX"),
    "a bottomless list": (
        with_bytes(lambda content: b"[" * 10**5, "adapter_config.json"),
        RecursionError,
        "recursion",
    ),
}


def load(case: TunerCase, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(case.model(), str(folder)).eval()


@pytest.mark.timeout(60)
@one_case_per_tuner
@pytest.mark.parametrize("damage", REFUSED)
def test_damaged_adapter_is_refused_and_a_loaded_one_works_on(case, damage, saved, tmp_path):
    change, kind, message = REFUSED[damage]
    folder = shutil.copytree(saved[case.name], tmp_path / "adapter")
    change(folder)
    with pytest.raises(kind, match=message):
        load(case, folder)
    model = load(case, saved[case.name])
    expected = case.logits(model)
    with pytest.raises(kind, match=message.replace("'default'", "'damaged'")):
        model.load_adapter(str(folder), adapter_name="damaged")
    assert torch.equal(case.logits(model), expected)


HARMLESS: dict[str, tuple[Change, float]] = {
    "double precision": (to_dtype(torch.float64), 0),
    "half precision": (to_dtype(torch.bfloat16), 2e-2),
    "an unknown field": (with_fields(router_temperature=0.5), 0),
    "another order": (with_tensors(lambda t: [t.update({name: t.pop(name)}) for name in sorted(t, reverse=True)]), 0),
    "a tensor of a stranger": (with_tensors(lambda t: t.update({"somebody.else": torch.zeros(1)})), 0),
}


@one_case_per_tuner
@pytest.mark.parametrize("change", HARMLESS)
def test_what_does_no_harm_loads_as_it_was_saved(case, change, saved, tmp_path):
    edit, tolerance = HARMLESS[change]
    folder = shutil.copytree(saved[case.name], tmp_path / "adapter")
    edit(folder)
    expected = case.logits(load(case, saved[case.name]))
    torch.testing.assert_close(case.logits(load(case, folder)), expected, rtol=0, atol=tolerance)


@one_case_per_tuner
def test_weights_of_another_method_or_of_other_sizes_are_refused(case, saved, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for name, config in (("lora", lora), ("sizes", case.other_config())):
        get_peft_model(case.model(), config).save_pretrained(tmp_path / name)
    methods = [tmp_path / "lora", *(saved[other.name] for other in CASES if other.tuner != case.tuner)]
    folder = shutil.copytree(saved[case.name], tmp_path / "adapter")
    for source in [*methods, tmp_path / "sizes"]:
        shutil.copy(source / WEIGHTS, folder)
        with pytest.raises(ValueError, match=NO_FIT.format("are missing from the file" if source in methods else "")):
            load(case, folder)


@one_case_per_tuner
def test_a_base_model_of_another_width_is_refused(case, saved):
    with pytest.raises(ValueError, match=NO_FIT.format("have another shape")):
        PeftModel.from_pretrained(case.model(hidden_size=64), str(saved[case.name]))


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int, Any]]:
    """What happens to which tensors."""
    kinds = {
        "drop": st.none(),
        "rename": st.sampled_from(["x", "layers.0", "weight", "default"]),
        "swap": st.integers(0, 10**6),
        "reshape": st.sampled_from(["flat", "transposed", "cut", "doubled", "nothing"]),
        "dtype": st.sampled_from([torch.float16, torch.float64, torch.int8, torch.bool, torch.uint8, torch.complex64]),
    }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3))
    return [(name, draw(st.integers(0, 10**6)), draw(kinds[name])) for name in names]


def reshaped(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how == "flat":
        return tensor.flatten()
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous()
    return {"cut": tensor[:-1], "doubled": torch.cat([tensor, tensor]), "nothing": tensor[:0]}[how].clone()


def edited(tensors: dict[str, torch.Tensor], todo: list[tuple[str, int, Any]]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    for kind, position, value in todo:
        name = sorted(tensors)[position % len(tensors)]
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[name.rpartition(".")[0] + f".{value}"] = tensors.pop(name)
        elif kind == "swap":
            other = sorted(tensors)[value % len(tensors)]
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            tensors[name] = reshaped(tensors[name], value) if kind == "reshape" else tensors[name].to(value)
    return tensors


ALL_CASES = [pytest.param(case, 200, id=f"{case.name}-200", marks=EXHAUSTIVE) for case in CASES]


@pytest.mark.parametrize(
    ("case", "max_examples"), [*(pytest.param(case, 20, id=case.tuner) for case in ONE_PER_TUNER), *ALL_CASES]
)
def test_edited_tensors_load_as_they_are_or_not_at_all(case, max_examples, saved, tmp_path):
    """Whatever is done to the tensors of a file: the model holds them afterwards, each in its place, or it refuses."""
    good = tensors_of(saved[case.name])
    damaged = shutil.copytree(saved[case.name], tmp_path / "adapter")

    @settings(max_examples=max_examples, **FUZZ)
    @given(edits())
    def run(todo: list[tuple[str, int, Any]]) -> None:
        tensors = edited(good, todo)
        safetensors.torch.save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, damaged / WEIGHTS, metadata={"format": "pt"}
        )
        try:
            model = load(case, damaged)
        except ValueError as error:
            assert "Nothing was loaded" in str(error)
            return
        model.save_pretrained(tmp_path / "again")
        found = tensors_of(tmp_path / "again")
        assert found.keys() == good.keys()
        assert all(torch.equal(found[name], tensors[name].to(found[name].dtype)) for name in found)

    run()


@pytest.mark.exhaustive
@pytest.mark.slow
@one_case_per_tuner
def test_a_wrong_byte_anywhere_is_refused_or_changes_what_it_says(case, saved, tmp_path):
    """The format has no checksum, so that a wrong byte in the numbers loads. One in the header is noticed."""
    folder = shutil.copytree(saved[case.name], tmp_path / "adapter")
    good = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    expected = case.logits(load(case, saved[case.name]))
    for position in range(0, header, 11):
        content = bytearray(good)
        content[position] ^= 1 << position % 8
        (folder / WEIGHTS).write_bytes(content)
        try:
            found = case.logits(load(case, folder))
        except (ValueError, KeyError, safetensors.SafetensorError, FloatingPointError):
            continue
        assert torch.equal(found, expected)
    assert os.path.getsize(folder / WEIGHTS) == len(good)
