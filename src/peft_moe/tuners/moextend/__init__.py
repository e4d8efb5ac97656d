"""MoExtend: new experts for a pretrained mixture of experts, old weights untouched."""

from .config import MoExtendConfig
from .model import MoExtendModel


__all__ = ["MoExtendConfig", "MoExtendModel"]
