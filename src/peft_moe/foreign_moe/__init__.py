"""The mixtures of experts of a base model that this package did not make: found by structure, run, and listened to."""

from .blocks import (
    COUNT_NAMES,
    MoeBlock,
    base_of,
    find_moe_blocks,
    gate_weight_name,
    num_groups,
    per_expert_tensors,
)
from .listening import BASE, RouterRecording, belongs_to_tuner, listen_to_routers
from .routers import Routing, probe, read_routing, returns_probabilities, route


__all__ = [
    "BASE",
    "COUNT_NAMES",
    "MoeBlock",
    "RouterRecording",
    "Routing",
    "base_of",
    "belongs_to_tuner",
    "find_moe_blocks",
    "gate_weight_name",
    "listen_to_routers",
    "num_groups",
    "per_expert_tensors",
    "probe",
    "read_routing",
    "returns_probabilities",
    "route",
]
