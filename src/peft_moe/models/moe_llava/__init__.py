"""MoE-LLaVA: a sparse LLaVA as a model of transformers, and its three stages of training."""

import transformers

from .configuration_moe_llava import MoeLlavaConfig
from .modeling_moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaModel
from .stages import MoeTuningStage


def register() -> None:
    """Register with `AutoConfig`, `AutoModel`, the Auto classes for images and text, and `AutoProcessor` (LLaVA's).

    Calling it again changes nothing.
    """
    transformers.AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
    transformers.AutoModel.register(MoeLlavaConfig, MoeLlavaModel, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        getattr(transformers, name).register(MoeLlavaConfig, MoeLlavaForConditionalGeneration, exist_ok=True)
    transformers.AutoProcessor.register(MoeLlavaConfig, transformers.LlavaProcessor, exist_ok=True)


__all__ = ["MoeLlavaConfig", "MoeLlavaForConditionalGeneration", "MoeLlavaModel", "MoeTuningStage", "register"]
