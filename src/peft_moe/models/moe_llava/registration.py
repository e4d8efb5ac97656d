"""Makes the Auto classes of transformers know MoeLlava."""

from __future__ import annotations

import transformers

from .configuration_moe_llava import MoeLlavaConfig
from .modeling_moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaModel


def register() -> None:
    """Register with `AutoConfig`, `AutoModel`, the Auto classes for images and text, and `AutoProcessor` (LLaVA's).

    Calling it again changes nothing.
    """
    transformers.AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
    transformers.AutoModel.register(MoeLlavaConfig, MoeLlavaModel, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if hasattr(transformers, name):
            getattr(transformers, name).register(MoeLlavaConfig, MoeLlavaForConditionalGeneration, exist_ok=True)
    transformers.AutoProcessor.register(MoeLlavaConfig, transformers.LlavaProcessor, exist_ok=True)
