"""`TrainWindow`: what training routed since the last log."""

from __future__ import annotations

import torch

from ..aux_loss import AuxLoss
from ..forward_context import ForwardPass
from ..routing_recorder import RoutingRecorder, statistics_of
from .expert_load import ExpertLoad
from .gathering import gather_json


class TrainWindow:
    """Counts and auxiliary losses of a few forward passes; reading them is the only thing that waits for the device.

    Args:
        load ([`ExpertLoad`]): an empty load to fill.
    """

    def __init__(self, load: ExpertLoad) -> None:
        self.load = load
        self._aux_loss_sum: torch.Tensor | float = 0.0
        self._num_aux_losses = 0

    def add_pass(self, forward_pass: ForwardPass, recorder: RoutingRecorder, *, domain: str) -> None:
        """Add one finished pass of `recorder`."""
        self.load.add_pass(forward_pass, domain=domain)
        aux_loss = recorder.context.find_hook(AuxLoss)
        if aux_loss is not None:
            with torch.no_grad():
                total = aux_loss.total(forward_pass, statistics_of(forward_pass))
            if total is not None:
                self._aux_loss_sum = self._aux_loss_sum + total
                self._num_aux_losses += 1

    def mean_aux_loss(self) -> float | None:
        """Mean of the weighted auxiliary loss over the passes of all processes, each of which has to call this.

        `None` where no adapter has one.
        """
        gathered = gather_json((float(self._aux_loss_sum), self._num_aux_losses))
        num_aux_losses = sum(number for _, number in gathered)
        return sum(total for total, _ in gathered) / num_aux_losses if num_aux_losses else None
