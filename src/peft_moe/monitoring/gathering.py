"""`gather_json`: a value of every process for every process, without the pickles of `torch.distributed`."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any) -> list[Any]:
    """`value` of every process as json gives it back, in order of rank; every process has to call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [json.loads(json.dumps(value))]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_collective_device())
    sizes = _all_gather(torch.tensor([content.numel()], device=content.device))
    padded = content.new_zeros(int(torch.stack(sizes).max()))
    padded[: content.numel()] = content
    rows = zip(_all_gather(padded), sizes, strict=True)
    return [json.loads(row[: int(size)].cpu().numpy().tobytes()) for row, size in rows]


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def _collective_device() -> torch.device:
    """The CPU if it can take part, else the current device of the first kind that can: NCCL knows CUDA only."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config().split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
