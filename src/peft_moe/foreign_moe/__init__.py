"""The mixtures of experts of a base model that this package did not make: found by structure, run, and listened to."""

from .blocks import (
    COUNT_NAMES,
    EXPERTS_NAME,
    MoeBlock,
    base_of,
    configs_of,
    find_moe_blocks,
    gate_weight_name,
    num_groups,
    per_expert_tensors,
)
from .listening import BASE, RouterRecording, belongs_to_tuner, listen_to_routers
from .probe import LOWEST, Pads, RouterProbe, Scoring, probe
from .routers import LargerRouter, in_groups, read_decision


__all__ = [
    "BASE",
    "COUNT_NAMES",
    "EXPERTS_NAME",
    "LOWEST",
    "LargerRouter",
    "MoeBlock",
    "Pads",
    "RouterProbe",
    "RouterRecording",
    "Scoring",
    "base_of",
    "belongs_to_tuner",
    "configs_of",
    "find_moe_blocks",
    "gate_weight_name",
    "in_groups",
    "listen_to_routers",
    "num_groups",
    "per_expert_tensors",
    "probe",
    "read_decision",
]
