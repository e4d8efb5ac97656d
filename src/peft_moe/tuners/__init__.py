"""The PEFT tuners of this package, registered with PEFT on import."""

from .mole import MoLEConfig, MoLEModel
from .registration import register_tuner


register_tuner("mole", config_cls=MoLEConfig, model_cls=MoLEModel)

__all__ = ["MoLEConfig", "MoLEModel"]
