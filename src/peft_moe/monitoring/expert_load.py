"""`ExpertLoad`: exact counts of which expert got how many tokens, and `record_expert_load` to collect them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..foreign_moe import listen_to_routers
from ..forward_context import ForwardPass
from ..routing_recorder import RouterRecord, records_of
from .summary import DEAD_THRESHOLD, LoadSummary, summarize_load


ALL, TEXT, IMAGE = "all", "text", "image"
TABLE_FORMAT = 1


class LoadKey(NamedTuple):
    """What a row of counts belongs to."""

    adapter: str
    router: str
    domain: str
    token_group: str


class ExpertLoad:
    """Counts how often each expert was chosen, per adapter, router, domain and token group. Padding does not count.

    A token that visits K experts counts K times. Counts are int64 and stay on the device of their router until they
    are read, so that counting never waits for a GPU.

    Token groups are `"text"` and `"image"` where `image_token_id` is given and the pass had `input_ids` of the shape
    that the router saw; all other tokens are in the group `"all"`.

    Args:
        image_token_id (`int`, *optional*): which entry of `input_ids` stands for an image token.

    Attributes:
        counts (`dict[LoadKey, torch.Tensor]`): tensors of shape `(E,)`, int64.
    """

    def __init__(self, *, image_token_id: int | None = None) -> None:
        self.image_token_id = image_token_id
        self.counts: dict[LoadKey, torch.Tensor] = {}

    @classmethod
    def for_model(cls, model: nn.Module) -> ExpertLoad:
        """An empty load that knows the image token of `model`, if its config names one."""
        return cls(image_token_id=image_token_id_of(model))

    @torch.no_grad()
    def add_pass(self, forward_pass: ForwardPass, *, domain: str = ALL) -> None:
        """Add what one finished forward pass routed; a router that ran several times is one router."""
        is_image = image_positions(forward_pass, self.image_token_id)
        for adapter, records in records_of(forward_pass).items():
            for name, record in records.items():
                router = name.partition("#")[0]
                counts = record.statistics.expert_counts.long().sum(dim=0)
                if is_image is None or record.token_mask is None or is_image.shape != record.token_mask.shape:
                    self.add_counts(LoadKey(adapter, router, domain, ALL), counts)
                    continue
                image_counts = _count_where(is_image, record, num_experts=counts.shape[0])
                self.add_counts(LoadKey(adapter, router, domain, TEXT), counts - image_counts)
                self.add_counts(LoadKey(adapter, router, domain, IMAGE), image_counts)

    def add_counts(self, key: LoadKey, counts: torch.Tensor) -> None:
        """Add counts of shape `(E,)`."""
        # out of place: a sum that began under torch.inference_mode may not be changed outside of it
        self.counts[key] = self.counts[key] + counts.to(self.counts[key].device) if key in self.counts else counts

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        total = ExpertLoad(image_token_id=self.image_token_id)
        for load in (self, other):
            for key, counts in load.counts.items():
                total.add_counts(key, counts)
        return total

    def without_domain(self, domain: str) -> ExpertLoad:
        """A copy in which `domain` has no counts."""
        rest = ExpertLoad(image_token_id=self.image_token_id)
        rest.counts = {key: counts for key, counts in self.counts.items() if key.domain != domain}
        return rest

    def renamed(self, domain: str) -> ExpertLoad:
        """A copy in which everything belongs to `domain`."""
        copy = ExpertLoad(image_token_id=self.image_token_id)
        for key, counts in self.counts.items():
            copy.add_counts(key._replace(domain=domain), counts)
        return copy

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have counts, in order of appearance."""
        return list(dict.fromkeys(key.adapter for key in self.counts))

    @property
    def domains(self) -> list[str]:
        """Names of the domains that have counts, in order of appearance."""
        return list(dict.fromkeys(key.domain for key in self.counts))

    @property
    def token_groups(self) -> list[str]:
        """Token groups that have counts, in order of appearance."""
        return list(dict.fromkeys(key.token_group for key in self.counts))

    def by_router(
        self, *, adapter: str | None = None, domain: str | None = None, token_group: str | None = None
    ) -> dict[str, list[int]]:
        """Counts `router name → E integers`, added up over everything that is not chosen.

        With several adapters and none chosen, names are `adapter.router`, for their experts are not the same. Waits
        for the device.
        """
        wanted = LoadKey(adapter, None, domain, token_group)  # type: ignore[arg-type]
        prefixes_adapter = adapter is None and len(self.adapters) > 1
        total: dict[str, torch.Tensor] = {}
        for key, counts in self.counts.items():
            if all(choice in (None, found) for choice, found in zip(wanted, key, strict=True)):
                name = f"{key.adapter}.{key.router}" if prefixes_adapter else key.router
                total[name] = total[name] + counts if name in total else counts
        return {name: counts.tolist() for name, counts in total.items()}

    def split(self, by: str = "domain", *, adapter: str | None = None) -> dict[str, dict[str, list[int]]]:
        """[`by_router`] for each domain or each token group.

        Args:
            by (`"domain"` or `"token_group"`): what to split by.
            adapter (`str`, *optional*): only this adapter.

        Raises:
            ValueError: another `by`.
        """
        if by == "domain":
            return {name: self.by_router(adapter=adapter, domain=name) for name in self.domains}
        if by == "token_group":
            return {name: self.by_router(adapter=adapter, token_group=name) for name in self.token_groups}
        raise ValueError(f"Expert load can be split by 'domain' or 'token_group', not by {by!r}.")

    def summary(
        self,
        *,
        adapter: str | None = None,
        domain: str | None = None,
        token_group: str | None = None,
        dead_threshold: float = DEAD_THRESHOLD,
    ) -> LoadSummary | None:
        """[`summarize_load`] of what [`by_router`] chooses; `None` where nothing was counted."""
        chosen = self.by_router(adapter=adapter, domain=domain, token_group=token_group)
        return summarize_load(chosen, dead_threshold=dead_threshold)

    def to_dict(self, *, dead_threshold: float = DEAD_THRESHOLD) -> dict[str, Any]:
        """Plain values for json: a summary per domain; counts adapter → router → domain → token group → E numbers."""
        counts: dict[str, Any] = {}
        for key, values in self.counts.items():
            by_domain = counts.setdefault(key.adapter, {}).setdefault(key.router, {})
            by_domain.setdefault(key.domain, {})[key.token_group] = values.tolist()
        summaries = {name: self.summary(domain=name, dead_threshold=dead_threshold) for name in self.domains}
        return {
            "format": TABLE_FORMAT,
            "summary": {name: entry.to_dict() for name, entry in summaries.items() if entry is not None},
            "counts": counts,
        }

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ExpertLoad:
        """The load that [`to_dict`] wrote.

        Raises:
            ValueError: `table` has another format.
        """
        if table.get("format") != TABLE_FORMAT:
            raise ValueError(
                f"This is no table of expert load of format {TABLE_FORMAT}: its format is {table.get('format')!r}. "
                "The file of ExpertLoadCallback holds two tables, under 'train' and under 'eval'."
            )
        load = cls()
        for adapter, by_router in table["counts"].items():
            for router, by_domain in by_router.items():
                for domain, by_group in by_domain.items():
                    for token_group, counts in by_group.items():
                        load.counts[LoadKey(adapter, router, domain, token_group)] = torch.tensor(counts)
        return load

    def all_reduce(self) -> ExpertLoad:
        """The sum over all processes, on the CPU of each; a copy where there is only one process.

        Every process has to call it. Processes need not have seen the same routers or domains.
        """
        total = ExpertLoad(image_token_id=self.image_token_id)
        for of_process in gather_json([[*key, counts.tolist()] for key, counts in self.counts.items()]):
            for *key, counts in of_process:
                total.add_counts(LoadKey(*key), torch.tensor(counts))
        return total


@contextmanager
def record_expert_load(model: nn.Module, domain: str = ALL, *, into: ExpertLoad | None = None) -> Iterator[ExpertLoad]:
    """Count the expert load of every forward pass inside the `with` block, in training, evaluation or generation.

    Works under `torch.no_grad()` and in eval mode, and leaves nothing behind. With `domain` and `into`, several blocks
    fill one table. In distributed runs the counts are those of this process; see [`ExpertLoad.all_reduce`].

    Args:
        model (`nn.Module`):
            A model with routers of ours, any mixture of experts whose routers are known (Mixtral, Qwen-MoE, MoeLlava,
            ...), whose adapter is then called `"base"`, or a wrapper around one.
        domain (`str`): what these passes are counted as.
        into (`ExpertLoad`, *optional*): the load to add to, instead of a new one.

    Example:

    ```py
    >>> with record_expert_load(model) as load:
    ...     model(**batch)
    >>> print(load.summary())
    ```

    Raises:
        ValueError: `model` has no router that is known.
    """
    load = ExpertLoad.for_model(model) if into is None else into

    def listen(forward_pass: ForwardPass) -> None:
        load.add_pass(forward_pass, domain=domain)

    with listen_to_routers(model, listen):
        yield load


def _count_where(is_chosen: torch.Tensor, record: RouterRecord, *, num_experts: int) -> torch.Tensor:
    """Counts `(E,)` of the tokens that are chosen `(B, S)` and no padding."""
    index, token_mask = record.top_k_index, record.token_mask
    assert index is not None and token_mask is not None
    is_counted = token_mask.to(index.device).long() * is_chosen.to(index.device).long()
    weight = is_counted.reshape(-1, 1).expand(index.shape)
    counts = torch.zeros(num_experts, dtype=torch.long, device=index.device)
    return counts.scatter_add_(0, index.reshape(-1), weight.reshape(-1))


def image_positions(forward_pass: ForwardPass, image_token_id: int | None) -> torch.Tensor | None:
    """Which tokens of a pass are image tokens, `(B, S)`; `None` where its `input_ids` do not say."""
    input_ids = forward_pass.inputs.get("input_ids")
    if image_token_id is None or not isinstance(input_ids, torch.Tensor):
        return None
    return input_ids == image_token_id


def image_token_id_of(model: nn.Module) -> int | None:
    """The image token that the config of a model, or of a module inside it, names."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("image_token_id", "image_token_index"):
            token_id = getattr(config, name, None)
            if isinstance(token_id, int):
                return token_id
    return None


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
