"""What a model returns, seen as named tensors that a loss can be built from."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def differentiable_outputs(output: Any) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a model's output that a loss can be built from.

    The output is a `ModelOutput` or dict, a tuple whose first entry, if a scalar, is the loss, or a tensor. A leaf that is
    handed through, such as a soft prompt, is no output of the model.
    """
    if isinstance(output, dict):
        fields = list(output.items())
    elif isinstance(output, torch.Tensor):
        fields = [("", output)]
    elif isinstance(output, tuple):
        fields = [(str(position), value) for position, value in enumerate(output)]
    else:
        fields = list(vars(output).items()) if hasattr(output, "__dict__") else []
    found = [
        (name, leaf)
        for name, value in fields
        if name != "past_key_values"
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf
    ]
    if found and found[0][0] in ("", "0") and found[0][1].dim() == 0:
        found[0] = ("loss", found[0][1])
    return found
