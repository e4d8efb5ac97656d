"""MoExtend: new experts for a pretrained mixture of experts, old weights untouched."""

from .config import MoExtendConfig
from .extender import Extender
from .model import MoExtendModel
from .report import ExtenderReport, selection_shift


__all__ = ["Extender", "ExtenderReport", "MoExtendConfig", "MoExtendModel", "selection_shift"]
