"""MoLE: a router and a few LoRA experts in every MLP, after LLaVA-MoLE."""

from .config import MoLEConfig
from .layer import MoLELayer
from .model import MoLEModel


__all__ = ["MoLEConfig", "MoLELayer", "MoLEModel"]
