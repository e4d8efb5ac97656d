"""MoCLE: the cluster of an instruction chooses the LoRA expert, after Mixture of Cluster-conditional LoRA Experts."""

from .clustering import InstructionClusterer, choose_num_clusters
from .clusters import ClusterIdsCollator
from .config import MoCLEConfig
from .entrance import attach_encoder
from .export import ClusterAdapterRouter, export_all, export_cluster_lora
from .layer import MoCLELayer
from .model import MoCLEModel


__all__ = [
    "ClusterAdapterRouter",
    "ClusterIdsCollator",
    "InstructionClusterer",
    "MoCLEConfig",
    "MoCLELayer",
    "MoCLEModel",
    "attach_encoder",
    "choose_num_clusters",
    "export_all",
    "export_cluster_lora",
]
