"""New rows of a router, the only part of it that trains."""

from __future__ import annotations

import torch
from torch import nn

from ...foreign_moe import gate_weight_name, per_expert_tensors


class GateRows(nn.Module):
    """What N new experts add to everything in a router that has an entry for each expert.

    Keys of a saved adapter are those of the router with `.` replaced by `_`: `weight` `(N, D)`, for some families `bias`
    `(N,)` and `e_score_correction_bias` `(N,)`, which does not train; and `offset` `(N,)` for `init="copy_guarded"`. A scale
    of the weights of each expert (gemma4) belongs to the expert, so it is copied whatever `init` is.

    Args:
        router (`nn.Module`): of the base model.
        num_experts (`int`): of the base model (E).
        sources (`list[int]`): which expert each new one copies.
        init (`str`): see [`MoExtendConfig`].
        guard_offset (`float`): see [`MoExtendConfig`].
        correction (`torch.Tensor` of shape `(E,)`, *optional*): what the block hands to its router with each call. The
            entries of the new experts are kept as `correction` `(N,)`, which does not train.
    """

    def __init__(
        self,
        router: nn.Module,
        num_experts: int,
        *,
        sources: list[int],
        init: str,
        guard_offset: float,
        correction: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        weight_name = gate_weight_name(router, num_experts)
        for name, (tensor, axis) in per_expert_tensors(router, num_experts).items():
            is_correction = not isinstance(tensor, nn.Parameter) or "correction" in name
            is_scale = not is_correction and name != weight_name and not name.endswith("bias")
            of_rows = "copy" if is_scale else init
            rows = _initial_rows(tensor.detach(), axis, sources, of_rows, is_correction=is_correction)
            self.names[name] = name.replace(".", "_")
            if is_correction:
                self.register_buffer(self.names[name], rows)
            else:
                self.register_parameter(self.names[name], nn.Parameter(rows))
        if correction is None:
            self.register_buffer("correction", None)
        else:
            rows = _initial_rows(correction.detach(), 0, sources, init, is_correction=True)
            self.register_buffer("correction", rows)
        if init == "copy_guarded":
            self.offset: nn.Parameter | None = nn.Parameter(torch.full((len(sources),), float(guard_offset)))
        else:
            self.register_parameter("offset", None)

    def forward(self) -> dict[str, torch.Tensor]:
        """The rows by the names that the router knows."""
        return {name: getattr(self, own) for name, own in self.names.items()}


def _initial_rows(
    tensor: torch.Tensor, axis: int, sources: list[int], init: str, *, is_correction: bool
) -> torch.Tensor:
    if tensor.is_meta or init == "copy" or (init == "copy_guarded" and not is_correction):
        return tensor.index_select(axis, torch.tensor(sources, device=tensor.device)).clone()
    size = [len(sources) if i == axis else entries for i, entries in enumerate(tensor.shape)]
    if init == "zero_gate" and not is_correction:
        return tensor.new_zeros(size)
    if init in ("zero_gate", "mean_gate"):
        # corrections are compared with each other only: 0 means nothing among them
        return tensor.mean(dim=axis, keepdim=True).expand(size).clone()
    # a correction that favours the copy would undo the guard
    return tensor.amin(dim=axis, keepdim=True).expand(size).clone()
