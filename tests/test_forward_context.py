"""The forward context begins, ends and finds passes, and knows nobody who keeps something in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_moe
from peft_moe.forward_context import get_context, install_context, remove_context


PACKAGE = Path(peft_moe.__file__).parent


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, input_ids):
        return self.linear(input_ids)


class Model(nn.Module):
    """A model with a backbone, as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone()

    def forward(self, input_ids, labels=None):
        return self.base_model(input_ids)


@pytest.fixture
def seen():
    """A model with a context, and what its innermost module finds: one pass per call of that module."""
    model, passes = Model(), []
    context = install_context(model)

    def keep(module, args):
        forward_pass = context.find_pass()
        if forward_pass is not None:
            forward_pass.state_of(list).append("called")
            forward_pass.keep_for_backward()
        passes.append(forward_pass)

    model.base_model.linear.register_forward_pre_hook(keep)
    return model, context, passes


@pytest.mark.parametrize("word", ["aux", "rout", "record", "expert", "cluster", "mole", "mocle", "moextend", "llava"])
def test_context_and_sequence_state_know_no_method_and_no_owner(word):
    text = (PACKAGE / "forward_context.py").read_text()
    assert not re.search(word, text, re.IGNORECASE)


def test_only_its_own_package_touches_the_state_of_the_auxiliary_loss():
    users = [path for path in PACKAGE.rglob("*.py") if "AuxLossState" in path.read_text()]
    assert {path.relative_to(PACKAGE).parts[0] for path in users} == {"aux_loss"}


def test_a_call_of_the_model_or_of_its_backbone_is_one_pass(seen):
    model, context, passes = seen
    model(torch.ones(2, 3), labels=torch.tensor(1))
    model.base_model(torch.zeros(2, 3))
    assert [sorted(entry.inputs) for entry in passes] == [["input_ids", "labels"], ["input_ids"]]
    assert passes[0] is not passes[1] and not any(entry.is_open for entry in passes)
    assert context.find_pass() is None


def test_what_runs_outside_a_pass_belongs_to_the_block_around_it(seen):
    model, context, passes = seen
    with context.surround({"labels": 1}), context.surround({"input_ids": 2}):
        model.base_model.linear(torch.ones(2, 3))
        model(torch.ones(2, 3))
    outside, inside = passes
    assert outside.inputs == {"labels": 1, "input_ids": 2} and inside.surrounding is outside
    assert inside.inputs["labels"] == 1 and isinstance(inside.inputs["input_ids"], torch.Tensor)


def test_extra_inputs_reach_the_pass_and_not_the_forward(seen):
    model, context, passes = seen
    context.extra_inputs.add("note")
    model(torch.ones(2, 3), note="hello")
    assert passes[0].inputs["note"] == "hello" and passes[0].inputs["batch_shape"] == (2, 3)


def test_backward_finds_the_pass_that_it_belongs_to(seen):
    model, context, passes = seen
    found = []

    def losses(numbers):
        for number in numbers:
            output = model(torch.full((2, 3), float(number)))
            output.grad_fn.register_hook(lambda *_: found.append(context.find_pass()))
            yield output.sum()

    first, second = losses([1, 2])
    (first + 2 * second).backward()
    assert {id(entry) for entry in found} == {id(entry) for entry in passes} and len(found) == 2
    assert context.latest is passes[1] and context.find_pass() is None


def test_tensors_with_a_graph_go_when_backward_or_the_next_pass_begins(seen):
    model, context, _ = seen
    for is_backward in (True, False):
        output = model(torch.ones(2, 3))
        context.graph_state["mine"] = output
        output.sum().backward() if is_backward else model(torch.ones(2, 3))
        assert context.graph_state == {}


def test_output_hooks_see_passes_in_which_somebody_kept_something(seen):
    model, context, passes = seen
    context.output_hooks.append(lambda context, forward_pass, output: (forward_pass, output))
    forward_pass, output = model(torch.ones(2, 3))
    assert forward_pass is passes[0] and output.shape == (2, 3)
    model.base_model.linear._forward_pre_hooks.clear()
    assert model(torch.ones(2, 3)).shape == (2, 3)


def test_a_pass_whose_forward_raised_is_closed_and_tells_nobody(seen):
    model, context, _ = seen
    context.output_hooks.append(lambda *_: pytest.fail("told"))
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    assert context.current is None and context.latest is None


def test_a_context_is_attached_once_and_removed_without_a_trace():
    model = Model()
    context = install_context(model)
    assert install_context(model) is context and get_context(nn.Sequential(model)) is context
    remove_context(model)
    assert get_context(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
