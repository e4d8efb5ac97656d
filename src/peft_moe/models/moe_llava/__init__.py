"""MoE-LLaVA: a sparse LLaVA as a model of transformers, and its three stages of training."""

from .configuration_moe_llava import MoeLlavaConfig
from .modeling_moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaModel
from .registration import register
from .stages import MoeTuningStage


__all__ = ["MoeLlavaConfig", "MoeLlavaForConditionalGeneration", "MoeLlavaModel", "MoeTuningStage", "register"]
