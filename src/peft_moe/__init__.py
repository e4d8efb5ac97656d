"""Mixtures of experts for Hugging Face: importing this package registers its tuners and its model."""

from ._version import __version__
from .aux_loss import get_aux_loss, set_aux_loss_scale
from .checkpoints import find_intact_checkpoint
from .kernels.ffn import register as _register_ffn_experts
from .models import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel, MoeTuningStage
from .models.moe_llava import register as _register_models
from .monitoring import ExpertLoadCallback, record_expert_load
from .optimization import router_parameter_groups
from .tuners import (
    ClusterAdapterRouter,
    ClusterIdsCollator,
    Extender,
    ExtenderReport,
    InstructionClusterer,
    MoCLEConfig,
    MoCLEModel,
    MoExtendConfig,
    MoExtendModel,
    MoLEConfig,
    MoLEModel,
    attach_encoder,
    choose_num_clusters,
    export_all,
    export_cluster_lora,
)


_register_models()
_register_ffn_experts()

__all__ = [
    "ClusterAdapterRouter",
    "ClusterIdsCollator",
    "ExpertLoadCallback",
    "Extender",
    "ExtenderReport",
    "InstructionClusterer",
    "MoCLEConfig",
    "MoCLEModel",
    "MoExtendConfig",
    "MoExtendModel",
    "MoLEConfig",
    "MoLEModel",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeTuningStage",
    "__version__",
    "attach_encoder",
    "choose_num_clusters",
    "export_all",
    "export_cluster_lora",
    "find_intact_checkpoint",
    "get_aux_loss",
    "record_expert_load",
    "router_parameter_groups",
    "set_aux_loss_scale",
]
