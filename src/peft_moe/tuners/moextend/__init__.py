"""MoExtend: new experts for a pretrained mixture of experts, old weights untouched."""

from .config import MoExtendConfig
from .extender import Extender
from .report import ExtenderReport, selection_shift
from .model import MoExtendModel


__all__ = ["Extender", "ExtenderReport", "MoExtendConfig", "MoExtendModel", "selection_shift"]
