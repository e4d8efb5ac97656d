"""What was saved before loads as it was, to the bit, and is saved again as it was."""

from __future__ import annotations

import pytest
import torch
from make_saved import BASE_OF, MODELS, SAVED, clusterer, load, logits_of, make_base
from safetensors.torch import load_file

from peft_moe import InstructionClusterer
from tiny_moe import FAMILIES


# families that the installed transformers does not have in a form that can be extended are left out
BASES = {"llama", "moe_llava", *(family.name for family in FAMILIES)}
NAMES = [*(name for name, base in BASE_OF.items() if base in BASES), *MODELS]


def expected_of(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Input, logits, and the logits of the bare base model."""
    tensors = load_file(SAVED / name / "expected.safetensors")
    logits, base_logits = tensors.pop("logits"), tensors.pop("base_logits", None)
    return tensors, logits, base_logits


@pytest.fixture(scope="module")
def has_the_same_bits() -> bool:
    """Whether the bare models give the bits of then: another processor or torch multiplies in another order."""
    found = []
    for name in ("mole", "moextend", "moextend_qwen2_moe", "moextend_moe_llava"):
        inputs, _, base_logits = expected_of(name)
        bare = logits_of(make_base(BASE_OF[name]), inputs)
        torch.testing.assert_close(bare, base_logits)
        found.append(torch.equal(bare, base_logits))
    return all(found)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_before_gives_the_same_logits_and_the_same_file(name, has_the_same_bits, tmp_path):
    inputs, logits, base_logits = expected_of(name)
    model = load(name)
    found = logits_of(model, inputs)
    if has_the_same_bits:
        assert torch.equal(found, logits)
    torch.testing.assert_close(found, logits)
    assert base_logits is None or not torch.allclose(logits, base_logits, atol=0.01)
    model.save_pretrained(tmp_path)
    for before in SAVED.joinpath(name).glob("*model.safetensors"):
        expected, tensors = load_file(before), load_file(tmp_path / before.name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


def test_a_clusterer_saved_before_has_the_same_clusters():
    found, expected = InstructionClusterer.from_pretrained(SAVED / "clusterer"), clusterer()
    assert torch.equal(found.centroids, expected.centroids)
    assert (found.template, found.instruction_pattern) == (expected.template, expected.instruction_pattern)
    assert found.encoder_name == expected.encoder_name
