"""Finds the MLP of a decoder layer by its structure, so that no text backbone needs code of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


# names of (gate, up, down); no gate: a plain MLP; no up: gate and up in one linear, gate first
LINEAR_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", None, "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation")


@dataclass(frozen=True)
class DenseMlp:
    """An MLP and which of its linears is which.

    Args:
        name (`str`): how the decoder layer calls it.
        module (`nn.Module`): the MLP.
        gate (`str`, *optional*), up (`str`, *optional*), down (`str`): names of its linears.
    """

    name: str
    module: nn.Module
    gate: str | None
    up: str | None
    down: str

    @property
    def has_gate(self) -> bool:
        """Whether a gate multiplies the inner activations."""
        return self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether any of the linears has a bias."""
        return any(linear.bias is not None for linear in self._linears())

    @property
    def hidden_size(self) -> int:
        """Width of input and output (D)."""
        return self._linear(self.down).out_features

    @property
    def intermediate_size(self) -> int:
        """Width inside (F)."""
        return self._linear(self.down).in_features

    @property
    def description(self) -> str:
        """Kind, sizes and activation; MLPs that can be experts of one layer have equal ones."""
        kind = ("gated" if self.has_gate else "plain") + (" with biases" if self.has_bias else "")
        return f"{kind}, {self.hidden_size} x {self.intermediate_size}, {type(self.act_fn).__name__}"

    @property
    def down_weight(self) -> torch.Tensor:
        """The weight `(D, F)` of the last linear."""
        return self._linear(self.down).weight

    @property
    def act_fn(self) -> nn.Module:
        """The activation."""
        return next(getattr(self.module, name) for name in ACTIVATION_NAMES if hasattr(self.module, name))

    def expert_tensors(self) -> dict[str, torch.Tensor]:
        """The weights as those of one expert: `gate_up_proj` `(2F, D)` or `up_proj` `(F, D)`, `down_proj` `(D, F)`."""
        inputs = [name for name in (self.gate, self.up) if name is not None]
        first = "gate_up_proj" if self.has_gate else "up_proj"
        parts = {first: [self._linear(name) for name in inputs], "down_proj": [self._linear(self.down)]}
        tensors = {}
        for name, linears in parts.items():
            tensors[name] = torch.cat([linear.weight.detach() for linear in linears])
            if self.has_bias:
                tensors[f"{name}_bias"] = torch.cat([_bias_of(linear) for linear in linears])
        return tensors

    def _linear(self, name: str) -> nn.Linear:
        return getattr(self.module, name)

    def _linears(self) -> list[nn.Linear]:
        return [self._linear(name) for name in (self.gate, self.up, self.down) if name is not None]


def find_dense_mlp(decoder_layer: nn.Module, *, layer_name: str) -> DenseMlp:
    """The MLP of a decoder layer.

    Raises:
        ValueError: the layer has no MLP of a known structure, or is a mixture already.
    """
    for name, module in decoder_layer.named_children():
        if any("experts" in child for child, _ in module.named_children()):
            raise ValueError(
                f"{layer_name}.{name} is {type(module).__name__}, a mixture already. MoeLlava needs a dense text "
                "model."
            )
        linear_names = {child for child, part in module.named_modules() if isinstance(part, nn.Linear)}
        for gate, up, down in LINEAR_NAMES:
            if linear_names == {gate, up, down} - {None}:
                _check_nothing_else_inside(module, linear_names, f"{layer_name}.{name}")
                return DenseMlp(name, module, gate, up, down)
    found = ", ".join(f"{name} ({type(module).__name__})" for name, module in decoder_layer.named_children())
    known = "; ".join(" + ".join(filter(None, names)) for names in LINEAR_NAMES)
    raise ValueError(
        f"{layer_name} has no MLP that can become experts. It consists of {found}. An MLP is recognised by its "
        f"linears: {known}. Choose another text model, or leave this layer out of moe_layers."
    )


def _check_nothing_else_inside(module: nn.Module, linear_names: set[str], name: str) -> None:
    has_activation = any(callable(getattr(module, attribute, None)) for attribute in ACTIVATION_NAMES)
    others = [
        f"{child} ({type(part).__name__})"
        for child, part in module.named_children()
        if child not in linear_names and child not in ACTIVATION_NAMES and not isinstance(part, nn.Identity)
    ]
    others += [
        f"{child}.{name} (a weight of the activation)"
        for child in ACTIVATION_NAMES
        if isinstance(getattr(module, child, None), nn.Module)
        for name in getattr(module, child).state_dict()
    ]
    if getattr(module, "residual_dropout", 0):
        others.append(f"residual_dropout={module.residual_dropout}")
    if others or not has_activation:
        found = f"also has {', '.join(others)}" if others else f"has none of {', '.join(ACTIVATION_NAMES)}"
        raise ValueError(
            f"{name} ({type(module).__name__}) {found}, so that experts made of its linears would compute something "
            "else. Choose another text model, or leave this layer out of moe_layers."
        )


def _bias_of(linear: nn.Linear) -> torch.Tensor:
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return linear.bias.detach()
