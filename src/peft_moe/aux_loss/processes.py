"""Load balancing over the tokens of all processes of a distributed run, where a configuration asks for it.

A load-balancing loss is a function of sums over tokens. For `router_aux_loss_scope="global"` the sums of the other
processes are added before the function is applied. They come by an all-reduce at the end of the forward pass: in
backward it could meet those of data parallelism in another order on each process. One before it checks that all
processes ran the same routers; for that one the host waits. Gradients flow to the tokens of the own process only; each
process contributes its part, and data parallelism adds the parts up.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from ..routing_recorder import RoutingStatistics


SCOPES = ("process", "global")


def num_processes() -> int:
    """Processes of the distributed run, 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def exchange(
    statistics: dict[str, dict[str, RoutingStatistics]], label_share: torch.Tensor | float
) -> tuple[dict[str, dict[str, RoutingStatistics]], torch.Tensor]:
    """Learn what the routers recorded on the other processes; every process has to be here with a pass of its own.

    Args:
        statistics (`dict[str, dict[str, RoutingStatistics]]`): of the adapters whose loss is over all processes,
            adapter name → router name → what this process recorded in a finished pass in training.
        label_share (`torch.Tensor` or `float`): share of this pass in what the loss divides by.

    Returns:
        `tuple`: sums over the samples `(1, E)` of the other processes, adapter name → router name → statistics; and
        the mean label share of the processes, a scalar. All of them have to give one common loss one weight.

    Raises:
        RuntimeError: on every process, if they did not run the same routers.
    """
    own = {
        (adapter, router): _summed(entry)
        for adapter, by_router in statistics.items()
        for router, entry in by_router.items()
    }
    device = next(iter(own.values())).num_tokens.device
    _check_alike([(*key, entry.expert_counts.shape[-1]) for key, entry in own.items()], device)
    share = torch.as_tensor(label_share, dtype=torch.float32, device=device).reshape(1)
    parts = [part.to(device) for entry in own.values() for part in entry] + [share]
    totals = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(totals)
    found = iter(totals.split([part.numel() for part in parts]))
    elsewhere: dict[str, dict[str, RoutingStatistics]] = {}
    for (adapter, router), entry in own.items():
        others = [next(found).view_as(part).to(part.device) - part for part in entry]
        elsewhere.setdefault(adapter, {})[router] = RoutingStatistics(*others)
    return elsewhere, totals[-1] / num_processes()


def with_other_processes(
    by_router: dict[str, RoutingStatistics], elsewhere: dict[str, RoutingStatistics] | None
) -> list[RoutingStatistics]:
    """The statistics that the loss of an adapter is a function of, one entry per router.

    Those of this process, or sums over all samples `(1, E)` of all processes where [`exchange`] found some elsewhere.
    Gradients to `by_router` are then multiplied by the number of processes, by which data parallelism divides.
    """
    if elsewhere is None:
        return list(by_router.values())
    return [_added(_summed(entry), elsewhere[router]) for router, entry in by_router.items()]


def _check_alike(routers: list[tuple[str, str, int]], device: torch.device) -> None:
    """What is summed has to be the same list everywhere, or sums are hung up or mixed up. Waits for the device."""
    mark = zlib.crc32(repr(routers).encode())
    extremes = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, negated_smallest = extremes.tolist()
    if largest != -negated_smallest:
        raise RuntimeError(
            "router_aux_loss_scope='global' adds up what the routers of all processes decided, but in this forward "
            f"pass the processes ran different routers; this one ran {len(routers)}. A model that drops layers at "
            "random (LayerDrop), or runs modules only for some inputs, does so: switch that off, or use "
            "router_aux_loss_scope='process'."
        )


def _summed(entry: RoutingStatistics) -> RoutingStatistics:
    return RoutingStatistics(*(part.sum(dim=0, keepdim=True) for part in entry))


def _added(own: RoutingStatistics, others: RoutingStatistics) -> RoutingStatistics:
    factor = num_processes()
    return RoutingStatistics(
        *(factor * part - (factor - 1) * part.detach() + other for part, other in zip(own, others, strict=True))
    )
