"""Mixtures of experts for Hugging Face: importing this package registers its tuners with PEFT."""

from ._version import __version__
from .aux_loss import get_aux_loss, set_aux_loss_scale
from .monitoring import ExpertLoadCallback, record_expert_load
from .optimization import router_parameter_groups
from .tuners import (
    ClusterIdsCollator,
    InstructionClusterer,
    MoCLEConfig,
    MoCLEModel,
    MoLEConfig,
    MoLEModel,
    attach_encoder,
    choose_num_clusters,
)


__all__ = [
    "ClusterIdsCollator",
    "ExpertLoadCallback",
    "InstructionClusterer",
    "MoCLEConfig",
    "MoCLEModel",
    "MoLEConfig",
    "MoLEModel",
    "__version__",
    "attach_encoder",
    "choose_num_clusters",
    "get_aux_loss",
    "record_expert_load",
    "router_parameter_groups",
    "set_aux_loss_scale",
]
