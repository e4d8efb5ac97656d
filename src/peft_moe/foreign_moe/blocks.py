"""Finds the mixtures of experts of a model by their structure: stacked experts beside a router.

Most families of transformers keep their experts as 3-D parameters in a child `experts`, and score them by one matrix in
a sibling called `gate` or `router`. What departs from that is a row of a table here, or is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig


# children of a block, by name
EXPERTS_NAME = "experts"
ROUTER_NAMES = ("gate", "router")
# attributes of modules and configurations that count experts
COUNT_NAMES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "out_features",
)
# attributes of routers that choose some of several groups of experts first
GROUP_NAMES = ("num_group", "n_group")
# types of weights that can be copied and trained; anything else is a quantised form of them
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# attributes of routers that hold the width of what they read
WIDTH_NAMES = ("hidden_dim", "hidden_size", "in_features", "dim")


def base_of(module: nn.Module) -> nn.Module:
    """The original module inside the layers that tuners have put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights of a module (or of something in it) only when it runs."""
    return any(
        parameter.is_meta and "_hf_hook" in inner.__dict__
        for inner in module.modules()
        for parameter in inner.parameters(recurse=False)
    )


@dataclass(frozen=True)
class MoeBlock:
    """A mixture of experts in a model.

    Args:
        name (`str`): of the block.
        layer (`int`): the layer that it is in, counted as in the model.
        router (`str`), experts (`str`): full names of the two modules.
        num_experts (`int`): of the base model (E).
        correction (`str`, *optional*): full name of a tensor `(E,)` that the block hands to its router with each call.
    """

    name: str
    layer: int
    router: str
    experts: str
    num_experts: int
    correction: str | None = None

    def correction_in(self, model: nn.Module) -> torch.Tensor | None:
        """The tensor that `correction` names in the model that this block was found in."""
        if self.correction is None:
            return None
        owner, _, own = self.correction.rpartition(".")
        tensor: torch.Tensor = getattr(model.get_submodule(owner), own)
        return tensor


def walk_blocks(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module], dict[str, torch.Tensor]]]:
    """Every module that has experts: its name, its children, and its own tensors, by name."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if EXPERTS_NAME in children and f".{EXPERTS_NAME}" not in name:
            yield name, children, dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


def find_moe_blocks(model: nn.Module) -> tuple[dict[int, MoeBlock], list[str]]:
    """The mixtures of experts of a model by layer, and a sentence for each that cannot be extended."""
    blocks: dict[int, MoeBlock] = {}
    refused = []
    for name, children, own in walk_blocks(model):
        found = read_block(name, {child: base_of(entry) for child, entry in children.items()}, own)
        if isinstance(found, str):
            refused.append(found)
        elif offloaded := [n for n in (found.router, found.experts) if is_offloaded(model.get_submodule(n))]:
            refused.append(
                f"'{offloaded[0]}' is offloaded to the CPU or a disk, so that its weights can be neither copied nor extended. "
                "Load the layer onto a device (device_map)."
            )
        elif found.layer in blocks:
            refused.append(
                f"'{name}': layer {found.layer} has a mixture of experts in '{blocks[found.layer].name}' already, so the "
                "number does not say which one is meant."
            )
        else:
            blocks[found.layer] = found
    return blocks, refused


def read_block(name: str, children: dict[str, nn.Module], own: dict[str, torch.Tensor]) -> MoeBlock | str:
    """The block of this name with these children and tensors, or the reason why it cannot be extended."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if not numbers:
        return f"'{name}' is in no list of layers, so that no number names it."
    num_experts = count_stacked(children[EXPERTS_NAME])
    if isinstance(num_experts, str):
        return f"'{name}.{EXPERTS_NAME}' ({type(children[EXPERTS_NAME]).__name__}) {num_experts}"
    router_name = next((router for router in ROUTER_NAMES if router in children), None)
    if router_name is None:
        return f"'{name}' has stacked experts, but no router beside them that is called {' or '.join(ROUTER_NAMES)}."
    router = children[router_name]
    if gate_weight_name(router, num_experts) is None:
        shapes = {parameter_name: tuple(parameter.shape) for parameter_name, parameter in router.named_parameters()}
        return (
            f"'{name}.{router_name}' ({type(router).__name__}) has not exactly one matrix with {num_experts} rows, one for "
            f"each expert, but {shapes}."
        )
    corrections = [f"{name}.{tensor_name}" for tensor_name, tensor in own.items() if tensor.shape == (num_experts,)]
    if len(corrections) > 1:
        return f"'{name}' has several tensors with an entry for each expert ({', '.join(corrections)})."
    return MoeBlock(
        name,
        numbers[0],
        f"{name}.{router_name}",
        f"{name}.{EXPERTS_NAME}",
        num_experts,
        corrections[0] if corrections else None,
    )


def count_stacked(experts: nn.Module) -> int | str:
    """How many experts a module of stacked experts holds, or what is wrong with it."""
    parameters = dict(experts.named_parameters(recurse=False))
    own = [*parameters.items(), *experts.named_buffers(recurse=False)]
    quantised = [
        f"'{name}' ({str(tensor.dtype)[6:]})"
        for name, tensor in own
        if "scale" in name or (name in parameters and tensor.dtype not in WEIGHT_DTYPES)
    ]
    if quantised:
        return (
            f"is quantised: it holds {', '.join(quantised)}, and a copy of an expert could not be trained. Load the base "
            "model without quantisation, or dequantised."
        )
    stacked = [parameter for parameter in parameters.values() if parameter.dim() == 3]
    if len(stacked) < 2:
        return "does not keep its experts as stacked 3-D parameters."
    counts = {parameter.shape[0] for parameter in parameters.values()}
    if len(counts) > 1:
        return f"has parameters whose first axis differs ({sorted(counts)}), so that it is not the number of experts."
    if any(True for child in experts.children() for _ in child.parameters()):
        return "has children with parameters, which new experts would have to share or to copy."
    if not _takes_choices(experts):
        _, *names = inspect.signature(type(experts).forward).parameters
        return (
            f"takes {', '.join(names)} instead of hidden_states, top_k_index and top_k_weights, so that no token can be sent to "
            "new experts."
        )
    if getattr(experts, "_is_expert_parallel", False):
        return "is spread over processes by expert parallelism. Load the base model without it."
    return int(counts.pop())


def _takes_choices(experts: nn.Module) -> bool:
    try:
        inspect.signature(type(experts).forward).bind(experts, "hidden_states", "top_k_index", "top_k_weights")
    except TypeError:
        return False
    return True


def gate_weight_name(router: nn.Module, num_experts: int) -> str | None:
    """Name of the matrix `(E, D)` of a router, `None` if there is not exactly one."""
    found = [n for n, p in router.named_parameters() if p.dim() == 2 and p.shape[0] == num_experts]
    return found[0] if len(found) == 1 else None


def per_expert_tensors(router: nn.Module, num_experts: int) -> dict[str, Any]:
    """Everything in a router that has one entry for each expert: the matrix, biases, corrections; name → (tensor, axis)."""
    weight_name = gate_weight_name(router, num_experts)
    found: dict[str, Any] = {}
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if name == weight_name:
            found[name] = (tensor, 0)
        elif tensor.numel() == num_experts and tensor.dim() >= 1 and tensor.shape[-1] == num_experts:
            found[name] = (tensor, tensor.dim() - 1)
    return found


def num_groups(router: nn.Module) -> int:
    """How many groups of experts a router chooses from first; 1 if there are none."""
    return next((getattr(router, name) for name in GROUP_NAMES if isinstance(getattr(router, name, None), int)), 1)


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations that the modules of a model hold, and those inside them, each once."""
    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in module.__dict__.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig | GenerationConfig) and id(value) not in found:
            found[id(value)] = value
            waiting += value.__dict__.values()
    return list(found.values())
