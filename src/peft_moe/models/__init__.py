"""Whole models that are mixtures of experts."""

from .moe_llava import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel, MoeTuningStage, register


__all__ = ["MoeLlavaConfig", "MoeLlavaForConditionalGeneration", "MoeLlavaModel", "MoeTuningStage", "register"]
