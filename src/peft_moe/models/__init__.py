"""Whole models that are mixtures of experts."""

from .moe_llava import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel, register


__all__ = ["MoeLlavaConfig", "MoeLlavaForConditionalGeneration", "MoeLlavaModel", "register"]
