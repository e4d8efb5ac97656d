"""`ExpertPathways`: exact counts of the sequences of experts that tokens take through all mixtures of a model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..foreign_moe import listen_to_routers
from ..forward_context import ForwardPass
from ..routing_recorder import RouterRecord, records_of
from .expert_load import ALL, IMAGE, TEXT, ExpertLoad, LoadKey, gather_json, image_positions, image_token_id_of


CHOICES = ("top_1", "top_k")
TABLE_FORMAT = 1
# rows that wait before they are merged: sorting a few at a time would cost more than counting
MAX_PENDING = 1 << 16


@dataclass(frozen=True)
class Pathway:
    """One way through the mixtures of a model, and the tokens that take it.

    Args:
        experts (`tuple[tuple[int, ...], ...]`): what is chosen in each layer, one expert or a set in ascending order.
        num_tokens (`int`): tokens that take it.
        share (`float`): of the tokens of its group, in (0, 1].
        independent_share (`float`):
            The share if layers chose independently of each other: the product, over layers, of the share of tokens
            that choose the same there.
    """

    experts: tuple[tuple[int, ...], ...]
    num_tokens: int
    share: float
    independent_share: float

    @property
    def lift(self) -> float:
        """`share / independent_share`: above 1 where layers agree on what these tokens are; chance for a few."""
        return self.share / self.independent_share if self.independent_share else math.inf

    @property
    def lift_label(self) -> str:
        """For people: `"2.4"`, and `">1000"` for all that is above."""
        return f"{self.lift:.3g}" if self.lift < 1000 else ">1000"

    @property
    def label(self) -> str:
        """For people: `"2 → 0 → 3"`, with sets `"0+2 → 1+3"`."""
        return " → ".join("+".join(map(str, chosen)) for chosen in self.experts)


class StackKey(NamedTuple):
    """Whose decisions a pathway is made of: routers that saw the same tokens, in the order in which they ran."""

    adapter: str
    routers: tuple[str, ...]


class PathwayCounts:
    """Distinct rows of experts and how often each was seen; memory grows with the distinct rows only.

    Args:
        num_experts (`tuple[int, ...]`): of each router.
        widths (`tuple[int, ...]`): how many entries of a row belong to each router.
    """

    def __init__(self, num_experts: tuple[int, ...], widths: tuple[int, ...]) -> None:
        self.num_experts, self.widths = num_experts, widths
        self._rows = torch.empty(0, sum(widths), dtype=torch.int16)
        self._counts = torch.empty(0, dtype=torch.long)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_pending = 0

    @property
    def sizes(self) -> list[int]:
        """How many values each entry of a row may have; a universal expert has the number E."""
        return [number + 1 for number, width in zip(self.num_experts, self.widths, strict=True) for _ in range(width)]

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add distinct rows `(U, C)` and their counts `(U,)`."""
        self._pending.append((rows.to("cpu", torch.int16), counts.cpu()))
        self._num_pending += rows.shape[0]
        if self._num_pending > max(MAX_PENDING, self._rows.shape[0]):
            self.merged()

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows `(U, C)`, int16, in lexicographic order, and their counts `(U,)`, int64."""
        if self._pending:
            parts = [(self._rows, self._counts), *self._pending]
            rows, counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            self._rows, self._counts = distinct_rows(rows, self.sizes, counts)
            self._pending, self._num_pending = [], 0
        return self._rows, self._counts


class ExpertPathways:
    """Counts the sequences of experts that tokens take through the mixtures of a model. Padding does not count.

    The pathway of a token consists of the decisions of one forward pass, of all routers in the same list of layers
    that saw the tokens; with a key-value cache each token is in one pass. Adapters are counted apart. Token groups are
    those of [`ExpertLoad`]. Each pass waits for the device once per token group, unlike in [`ExpertLoad`].

    After figure 6 of MoE-LLaVA (https://huggingface.co/papers/2401.15947), whose released code projects the matrix of
    expert numbers on principal components and rounds them; these are the sequences themselves.

    Args:
        choice (`"top_1"` or `"top_k"`): follow the best expert of each router, or the set of all that it chose.
        image_token_id (`int`, *optional*): which entry of `input_ids` stands for an image token.

    Raises:
        ValueError: another `choice`.
    """

    def __init__(self, *, choice: str = "top_1", image_token_id: int | None = None) -> None:
        if choice not in CHOICES:
            raise ValueError(f"Pathways follow one of the choices {CHOICES}, but found {choice!r}.")
        self.choice = choice
        self.image_token_id = image_token_id
        self.counts: dict[StackKey, dict[str, PathwayCounts]] = {}

    @classmethod
    def for_model(cls, model: nn.Module, *, choice: str = "top_1") -> ExpertPathways:
        """Empty pathways that know the image token of `model`, if its config names one."""
        return cls(choice=choice, image_token_id=image_token_id_of(model))

    @torch.no_grad()
    def add_pass(self, forward_pass: ForwardPass) -> None:
        """Add what one finished forward pass routed; a block that ran several times is several steps of the path."""
        is_image = image_positions(forward_pass, self.image_token_id)
        for adapter, records in records_of(forward_pass).items():
            for stack in _stacks(records):
                self._add_tokens(StackKey(adapter, tuple(stack)), list(stack.values()), is_image)

    def _add_tokens(self, key: StackKey, records: list[RouterRecord], is_image: torch.Tensor | None) -> None:
        num_experts = tuple(record.statistics.expert_counts.shape[-1] for record in records)
        chosen = [self._followed(record.top_k_index) for record in records if record.top_k_index is not None]
        rows = torch.cat([index.to(chosen[0].device) for index in chosen], dim=-1)
        assert records[0].token_mask is not None
        mask = records[0].token_mask.to(rows.device).bool()
        groups = {ALL: mask}
        if is_image is not None and is_image.shape == mask.shape:
            is_image = is_image.to(rows.device)
            groups = {TEXT: mask & ~is_image, IMAGE: mask & is_image}
        for group, is_counted in groups.items():
            of_group = rows[is_counted.reshape(-1)]
            if of_group.shape[0]:
                counts = self._counts_of(key, group, num_experts, tuple(index.shape[-1] for index in chosen))
                counts.add(*distinct_rows(of_group, counts.sizes))

    def _followed(self, top_k_index: torch.Tensor) -> torch.Tensor:
        return top_k_index[:, :1] if self.choice == "top_1" else top_k_index.sort(dim=-1).values

    def _counts_of(
        self, key: StackKey, group: str, num_experts: tuple[int, ...], widths: tuple[int, ...]
    ) -> PathwayCounts:
        by_group = self.counts.setdefault(key, {})
        found = by_group.setdefault(group, PathwayCounts(num_experts, widths))
        if (found.num_experts, found.widths) != (num_experts, widths):
            raise ValueError(
                f"The routers of adapter {key.adapter!r} had {list(found.num_experts)} experts and chose "
                f"{list(found.widths)} of them; now it is {list(num_experts)} and {list(widths)}. Count the two "
                "models in two ExpertPathways."
            )
        return found

    def _add(self, other: ExpertPathways) -> None:
        if other.choice != self.choice:
            raise ValueError(f"Pathways of choice {self.choice!r} cannot be added to those of {other.choice!r}.")
        for key, group, counts in other._entries():
            self._counts_of(key, group, counts.num_experts, counts.widths).add(*counts.merged())

    def _entries(self) -> Iterator[tuple[StackKey, str, PathwayCounts]]:
        for key, by_group in self.counts.items():
            for group, counts in by_group.items():
                yield key, group, counts

    def __add__(self, other: ExpertPathways) -> ExpertPathways:
        total = ExpertPathways(choice=self.choice, image_token_id=self.image_token_id)
        total._add(self)
        total._add(other)
        return total

    @property
    def stacks(self) -> dict[str, StackKey]:
        """What the routers are in, by name: the list of layers, with the adapter in front where there are several."""
        has_several = len({key.adapter for key in self.counts}) > 1
        named: dict[str, StackKey] = {}
        for key in self.counts:
            name = ".".join(part for part in (key.adapter if has_several else "", _layer_list(key.routers[0])) if part)
            name = name or "routers"
            repeat = sum(known.partition("#")[0] == name for known in named)
            named[f"{name}#{repeat + 1}" if repeat else name] = key
        return named

    @property
    def token_groups(self) -> list[str]:
        """Token groups that have counts, in order of appearance."""
        return list(dict.fromkeys(group for _, group, _ in self._entries()))

    def merged(
        self, *, token_group: str | None = None, stack: str | None = None
    ) -> tuple[StackKey, PathwayCounts, torch.Tensor, torch.Tensor]:
        """The stack that is meant, and its distinct rows `(U, C)` with counts `(U,)`, of one or all token groups.

        Raises:
            ValueError: nothing was counted, there is no such stack or group, or several stacks and none is named.
        """
        stacks = self.stacks
        if not stacks:
            raise ValueError("There are no pathways: no forward pass was counted.")
        if stack is None and len(stacks) > 1:
            raise ValueError(
                f"There are pathways of several stacks of layers: choose one by stack=, of {list(stacks)}."
            )
        name = next(iter(stacks)) if stack is None else stack
        if name not in stacks:
            raise ValueError(f"There is no stack {name!r} with pathways. Choose one of {list(stacks)}.")
        key = stacks[name]
        by_group = self.counts[key]
        if token_group is not None and token_group not in by_group:
            raise ValueError(
                f"No token of group {token_group!r} was counted in {name!r}. Choose one of {list(by_group)}; 'text' "
                "and 'image' need a config with image_token_id (or image_token_index) and calls with input_ids."
            )
        parts = list(by_group.values()) if token_group is None else [by_group[token_group]]
        total = PathwayCounts(parts[0].num_experts, parts[0].widths)
        for part in parts:
            total.add(*part.merged())
        return key, total, *total.merged()

    def top(self, n: int = 10, *, token_group: str | None = None, stack: str | None = None) -> list[Pathway]:
        """The `n` pathways that most tokens take, the most common one first; equal ones in lexicographic order.

        Args:
            n (`int`): how many at most.
            token_group (`str`, *optional*): `"text"`, `"image"` or `"all"`; every token where it is not given.
            stack (`str`, *optional*): which entry of [`stacks`]; needed where there are several.

        Raises:
            ValueError: nothing was counted, there is no such stack or group, or several stacks and none is named.
        """
        _, counted, rows, counts = self.merged(token_group=token_group, stack=stack)
        total = int(counts.sum())
        layers = [part.T.contiguous() for part in _by_router(rows, counted.widths)]
        found = []
        for index in counts.argsort(descending=True, stable=True)[:n].tolist():
            same = [counts[(layer == layer[:, index : index + 1]).all(dim=0)].sum() for layer in layers]
            experts = tuple(tuple(layer[:, index].tolist()) for layer in layers)
            num_tokens = int(counts[index])
            independent_share = math.prod(int(number) / total for number in same)
            found.append(Pathway(experts, num_tokens, num_tokens / total, independent_share))
        return found

    def summary(
        self, n: int = 10, *, token_group: str | None = None, stack: str | None = None
    ) -> dict[str, int | float]:
        """How concentrated pathways are; arguments and errors as in [`top`].

        Returns:
            `num_tokens`; `num_pathways`, distinct ones; `top_share` of the tokens in the `n` most common ones; and
            `independent_top_share`, what the `n` most common ones would hold if layers with the same load chose
            independently of each other.
        """
        _, counted, rows, counts = self.merged(token_group=token_group, stack=stack)
        total = int(counts.sum())
        largest = [1.0]
        for part, number in zip(_by_router(rows, counted.widths), counted.num_experts, strict=True):
            _, of_layer = distinct_rows(part, [number + 1] * part.shape[-1], counts)
            shares = heapq.nlargest(n, (count / total for count in of_layer.tolist()))
            largest = heapq.nlargest(n, (share * other for share in shares for other in largest))
        return {
            "num_tokens": total,
            "num_pathways": rows.shape[0],
            "top_share": int(counts.sort(descending=True).values[:n].sum()) / total,
            "independent_top_share": sum(largest),
        }

    def expert_load(self) -> ExpertLoad:
        """How many of the pathways' tokens visit each expert: with `choice="top_1"`, the load that the paper plots."""
        load = ExpertLoad(image_token_id=self.image_token_id)
        for key, group, counted in self._entries():
            rows, counts = counted.merged()
            layers = zip(key.routers, counted.num_experts, _by_router(rows, counted.widths), strict=True)
            for name, num_experts, part in layers:
                found = torch.zeros(num_experts + 1, dtype=torch.long)
                found.scatter_add_(0, part.long().reshape(-1), counts.unsqueeze(-1).expand(part.shape).reshape(-1))
                load.add_counts(LoadKey(key.adapter, name.partition("#")[0], ALL, group), found[:num_experts])
        return load

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json: every pathway and its count."""
        pathways = []
        for key, group, counted in self._entries():
            rows, counts = counted.merged()
            entry: dict[str, Any] = {"adapter": key.adapter, "routers": list(key.routers), "token_group": group}
            entry |= {"num_experts": list(counted.num_experts), "widths": list(counted.widths)}
            pathways.append({**entry, "experts": rows.tolist(), "counts": counts.tolist()})
        return {"format": TABLE_FORMAT, "choice": self.choice, "pathways": pathways}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ExpertPathways:
        """The pathways that [`to_dict`] wrote.

        Raises:
            ValueError: `table` has another format.
        """
        if table.get("format") != TABLE_FORMAT or "pathways" not in table:
            raise ValueError(
                f"This is no table of pathways of format {TABLE_FORMAT}: its format is {table.get('format')!r} and "
                f"its entries are {sorted(table)}. Give what ExpertPathways.to_dict returned."
            )
        pathways = cls(choice=table["choice"])
        for entry in table["pathways"]:
            key = StackKey(entry["adapter"], tuple(entry["routers"]))
            sizes = (tuple(entry["num_experts"]), tuple(entry["widths"]))
            pathways._counts_of(key, entry["token_group"], *sizes).add(
                torch.tensor(entry["experts"]), torch.tensor(entry["counts"])
            )
        return pathways

    def all_reduce(self) -> ExpertPathways:
        """The sum over all processes; a copy where there is only one process. Every process has to call it."""
        total = ExpertPathways(choice=self.choice, image_token_id=self.image_token_id)
        for table in gather_json(self.to_dict()):
            total._add(self.from_dict(table))
        return total


@contextmanager
def record_pathways(
    model: nn.Module, *, choice: str = "top_1", into: ExpertPathways | None = None
) -> Iterator[ExpertPathways]:
    """Count the pathways of every forward pass inside the `with` block, in training, evaluation or generation.

    Works under `torch.no_grad()`, leaves nothing behind, and may stand inside or around [`record_expert_load`]. In
    distributed runs the counts are those of this process; see [`ExpertPathways.all_reduce`].

    Args:
        model (`nn.Module`): as for [`record_expert_load`].
        choice (`"top_1"` or `"top_k"`): see [`ExpertPathways`].
        into (`ExpertPathways`, *optional*): the pathways to add to, whose `choice` then counts.

    Example:

    ```py
    >>> with record_pathways(model) as pathways:
    ...     model(**batch)
    >>> for pathway in pathways.top(10, token_group="image"):
    ...     print(pathway.label, pathway.share, pathway.lift)
    ```

    Raises:
        ValueError: `model` has no router that is known, or another `choice`.
    """
    pathways = ExpertPathways.for_model(model, choice=choice) if into is None else into
    with listen_to_routers(model, pathways.add_pass):
        yield pathways


def distinct_rows(
    rows: torch.Tensor, sizes: Sequence[int], counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows in lexicographic order, and how often each occurs. Waits for the device.

    Rows become single integers in a mixed radix; where these would not fit, their rank takes their place, which is
    smaller than the number of rows. So it is exact for any number of columns, and sorts integers only.

    Args:
        rows (`torch.Tensor` of shape `(T, C)`, integers): entries of column c are below `sizes[c]`.
        sizes (`Sequence[int]`): C numbers.
        counts (`torch.Tensor` of shape `(T,)`, int64, *optional*): how often each row counts, instead of once.

    Returns:
        `(U, C)` and `(U,)`, int64.
    """
    code = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
    num_codes = 1
    for column, size in zip(rows.unbind(dim=-1), sizes, strict=True):
        if num_codes * size >= 1 << 62:
            known, code = torch.unique(code, return_inverse=True)
            num_codes = known.shape[0]
        code = code * size + column
        num_codes *= size
    known, code = torch.unique(code, return_inverse=True)
    ones = torch.ones_like(code) if counts is None else counts
    totals = torch.zeros_like(known).scatter_add_(0, code, ones)
    position = torch.zeros_like(known).scatter_(0, code, torch.arange(rows.shape[0], device=rows.device))
    return rows[position], totals


def _stacks(records: dict[str, RouterRecord]) -> list[dict[str, RouterRecord]]:
    """Routers in the same list of layers that saw equally many tokens, in the order in which they ran."""
    stacks: dict[tuple[str, torch.Size], dict[str, RouterRecord]] = {}
    for name, record in records.items():
        if record.top_k_index is not None and record.token_mask is not None and record.top_k_index.shape[-1]:
            stacks.setdefault((_layer_list(name), record.token_mask.shape), {})[name] = record
    return list(stacks.values())


def _layer_list(router: str) -> str:
    """Name of the list of layers that a router is in.

    >>> _layer_list("model.layers.3.mlp")
    'model.layers'
    """
    parts = router.partition("#")[0].split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[:number])


def _by_router(rows: torch.Tensor, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """The columns of each router."""
    ends = [sum(widths[: index + 1]) for index in range(len(widths))]
    return [rows[:, end - width : end] for end, width in zip(ends, widths, strict=True)]
