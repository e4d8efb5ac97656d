"""The PEFT tuners of this package, registered with PEFT on import."""

from .mocle import (
    ClusterAdapterRouter,
    ClusterIdsCollator,
    InstructionClusterer,
    MoCLEConfig,
    MoCLEModel,
    attach_encoder,
    choose_num_clusters,
    export_all,
    export_cluster_lora,
)
from .moextend import Extender, ExtenderReport, MoExtendConfig, MoExtendModel
from .mole import MoLEConfig, MoLEModel
from .registration import register_tuner


register_tuner("mole", config_cls=MoLEConfig, model_cls=MoLEModel)
register_tuner("mocle", config_cls=MoCLEConfig, model_cls=MoCLEModel)
register_tuner("moextend", config_cls=MoExtendConfig, model_cls=MoExtendModel)

__all__ = [
    "ClusterAdapterRouter",
    "ClusterIdsCollator",
    "Extender",
    "ExtenderReport",
    "InstructionClusterer",
    "MoCLEConfig",
    "MoCLEModel",
    "MoExtendConfig",
    "MoExtendModel",
    "MoLEConfig",
    "MoLEModel",
    "attach_encoder",
    "choose_num_clusters",
    "export_all",
    "export_cluster_lora",
]
