"""The auxiliary losses of routers, and how they reach backward under any training loop."""

from .gradient import AuxLossFunction
from .install import AuxLoss, get_aux_loss, install_aux_loss, set_aux_loss_scale, weighted_aux_loss
from .losses import AUX_LOSS_TYPES, load_balancing_loss, router_z_loss
from .processes import SCOPES


__all__ = [
    "AUX_LOSS_TYPES",
    "SCOPES",
    "AuxLoss",
    "AuxLossFunction",
    "get_aux_loss",
    "install_aux_loss",
    "load_balancing_loss",
    "router_z_loss",
    "set_aux_loss_scale",
    "weighted_aux_loss",
]
