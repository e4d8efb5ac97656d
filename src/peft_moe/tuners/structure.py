"""Finds the linears of MLPs and attention blocks by how they are named and which siblings they have.

Names alone do not tell (BERT's `output.dense` is in both kinds of block); a set of siblings does. Nothing here depends
on an architecture, so models that PEFT does not know are covered if they use common names.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..foreign_moe import base_of


# the linears of one block, those that read the block's input first
MLP_BLOCKS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("wi", "wo"),
    ("Wi", "Wo"),
    ("fc_in", "fc_out"),
    ("fc1", "fc2"),
    ("c_fc", "c_fc2", "c_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("w1", "w3", "w2"),
    ("w1", "w2"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("ffn", "ffn_output"),
    ("intermediate.dense", "output.dense"),
    ("intermediate_query.dense", "output_query.dense"),
    ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
    ("feed_forward.key", "feed_forward.receptance", "feed_forward.value"),
)

ATTENTION_BLOCKS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("qkv_proj", "o_proj"),
    ("qkv_proj", "out_proj"),
    ("query_key_value", "dense"),
    ("Wqkv", "out_proj"),
    ("Wqkv", "Wo"),
    ("c_attn", "c_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q", "k", "v", "o"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    ("self.in_proj", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "attention.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("attention.receptance", "attention.key", "attention.value", "attention.output"),
)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes `x W + b`: `nn.Linear`, transformers' `Conv1D`, and the quantised linears."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    has_features = hasattr(module, "in_features") and hasattr(module, "out_features")
    return has_features and (hasattr(module, "qweight") or hasattr(module, "W_q"))


def find_blocks(linear_names: Iterable[str], block_kinds: tuple[tuple[str, ...], ...]) -> dict[str, list[str]]:
    """Group linears into blocks.

    Args:
        linear_names (`Iterable[str]`): full names of all linears of a model.
        block_kinds: `MLP_BLOCKS` or `ATTENTION_BLOCKS`; earlier kinds win.

    Returns:
        `dict[str, list[str]]`: name of the block → full names of its linears, those that read its input first.
    """
    names = list(linear_names)
    known = set(names)
    taken: set[str] = set()
    blocks: dict[str, list[str]] = {}
    for kind in block_kinds:
        for name in names:
            if name in taken or not (name == kind[0] or name.endswith(f".{kind[0]}")):
                continue
            block = name[: -len(kind[0])].rstrip(".")
            members = [f"{block}.{member}" if block else member for member in kind]
            if all(member in known and member not in taken for member in members):
                blocks[block] = members
                taken.update(members)
    return blocks


def text_linear_names(model: nn.Module) -> list[str]:
    """Names of the linears of a model, for a multi-modal one of its language model only."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    root = ""
    if text_config is not config:
        roots = [
            name
            for name, module in model.named_modules()
            if module is not model and type(getattr(module, "config", None)) is type(text_config)
        ]
        root = min(roots, key=len) if roots else ""
    return [name for name, module in model.named_modules() if name.startswith(root) and is_linear(base_of(module))]


def shorten(names: list[str], all_names: list[str]) -> list[str]:
    """The last parts of `names` if they select exactly `names` among `all_names`, else `names`."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    selected = {name for name in all_names if name.rpartition(".")[2] in ends}
    return ends if selected == set(names) else sorted(names)


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether a process holds only its part of a tensor (a `DTensor`)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_gathered_when_called(module: nn.Module) -> bool:
    """Whether FSDP gathers a group of parameters when the module is called."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_split(model: nn.Module, name: str, weight: torch.Tensor | None) -> bool:
    """Whether the module `name` computes with a part of its weight (tensor parallelism); FSDP gathers it first."""
    if not is_sharded(weight):
        return False
    path = name.split(".")
    is_gathered = any(
        is_gathered_when_called(model.get_submodule(".".join(path[:depth]))) for depth in range(len(path) + 1)
    )
    return not is_gathered or "tp" in (weight.device_mesh.mesh_dim_names or ())  # type: ignore[union-attr]


def check_target(model: nn.Module, name: str, module: nn.Module, *, method: str) -> None:
    """Raise `ValueError` unless experts can be added to the module `name` and would have an effect."""
    kind = type(module).__name__
    if not is_linear(module):
        raise ValueError(
            f"{method} needs nn.Linear, but '{name}' is {kind}. Remove it with "
            f"exclude_modules=['{name.rpartition('.')[2]}'], or pick other target_modules."
        )
    if is_split(model, name, getattr(module, "weight", None)):
        raise ValueError(
            f"'{name}' is split over processes by tensor parallelism ({module.weight.placements}), and {method} adds "
            "experts to whole linears only. Load the base model without tp_plan, and share it out by FSDP or "
            f"DeepSpeed instead; or exclude what the plan splits: exclude_modules=['{name.rpartition('.')[2]}', ...]."
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"'{name}' belongs to {type(parent).__name__}, which reads the weight of its linears without calling "
            f"them, so that experts there would have no effect. Exclude it with exclude_modules=['{name}']."
        )
