"""MoE-LLaVA: a sparse LLaVA as a model of transformers."""

from .configuration_moe_llava import MoeLlavaConfig
from .modeling_moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaModel
from .registration import register


__all__ = ["MoeLlavaConfig", "MoeLlavaForConditionalGeneration", "MoeLlavaModel", "register"]
