"""Tries a router out on made-up numbers, once: what it does with further experts, and how it makes weights of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..routing import RouterOutput
from .blocks import MoeBlock, num_groups
from .routers import LargerRouter, in_groups, read_decision


NUM_TOKENS = 32
LOWEST = -3e4
"""what a pad has where a router adds something for each expert; finite in every floating-point type"""
SHIFT = 16.0
"""how far all logits are moved, down for half of the tokens, up for the others, where pads are tried"""


@dataclass(frozen=True)
class Scoring:
    """How a router makes weights of logits.

    Args:
        is_sigmoid (`bool`): weights are proportional to the sigmoid of the logits, not to their softmax.
        is_normalized (`bool`): their sum is the same for every token.
        is_single (`bool`): one expert is chosen for each token.
    """

    is_sigmoid: bool
    is_normalized: bool
    is_single: bool = False

    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """`(T, E)` → `(T, E)`, float32."""
        logits = router_logits.float()
        return torch.sigmoid(logits) if self.is_sigmoid else torch.softmax(logits, dim=-1)


@dataclass(frozen=True)
class Pads:
    """Experts that fill up a layer and change no output. They stand behind the experts of each group.

    Args:
        are_copies (`bool`): they are copies of expert 0 in all; otherwise their weights and rows are 0, and everything
            that the router adds for each expert is [`LOWEST`].
    """

    are_copies: bool

    def fill(self, tensor: torch.Tensor, axis: int, num: int, groups: int, *, value: float = LOWEST) -> torch.Tensor:
        """`tensor` with entries for `num` pads along `axis`, of this value where they are no copies."""
        if self.are_copies:
            pads = tensor.index_select(axis, torch.zeros(num, dtype=torch.int64, device=tensor.device))
        else:
            shape = [num if i == axis else size for i, size in enumerate(tensor.shape)]
            pads = tensor.new_full(shape, value)
        return in_groups([tensor, pads], axis, groups)


@dataclass(frozen=True)
class RouterProbe:
    """What a router did with made-up numbers.

    Args:
        problem (`str`, *optional*): why it cannot be extended; nothing else is known then.
        is_probability (`bool`): it returns probabilities where others return logits.
        takes_offset (`bool`): it does nothing with its input but to multiply it by its matrix.
        scoring (`Scoring`, *optional*): `None` if its weights follow neither softmax nor sigmoid.
        pads (`Pads`, *optional*): experts that change no output, whatever the input is; `None` if there are none.
    """

    problem: str | None = None
    is_probability: bool = False
    takes_offset: bool = False
    scoring: Scoring | None = None
    pads: Pads | None = None


def probe(router: nn.Module, block: MoeBlock, num_new: int | None = None) -> RouterProbe:
    """Run a copy of a router with `num_new` further experts (by default one for each group) on made-up numbers.

    All of it is on the CPU and in float32, wherever the router is; its hooks see nothing of it.
    """
    groups = num_groups(router)
    num_new = num_new or groups
    if (block.num_experts + num_new) % groups:
        return RouterProbe(
            f"chooses among {groups} groups of equal size, which {block.num_experts} + {num_new} experts do not make. Choose "
            f"num_new_experts so that the sum is a multiple of {groups}"
        )
    trial = _Trial(router, block)
    decision = trial.run(block.num_experts + num_new)
    if isinstance(decision, str):
        return RouterProbe(decision)
    is_probability = _is_probability(decision.router_logits)
    if is_probability:
        logits = decision.router_logits.clamp(min=torch.finfo(torch.float32).tiny).log()
        decision = decision._replace(router_logits=logits)
    scoring = _scoring(decision)
    pads = None
    if trial.ignores(Pads(are_copies=False)):
        pads = Pads(are_copies=False)
    elif groups == 1 and scoring is not None and scoring.is_single and scoring.is_normalized:
        pads = Pads(are_copies=True)  # with one choice of a fixed weight it does not matter which of equal experts it is
    return RouterProbe(
        is_probability=is_probability,
        takes_offset=not isinstance(trial.run(block.num_experts + num_new, has_offset=True), str),
        scoring=scoring,
        pads=pads,
    )


class _Trial:
    """A router, and made-up numbers for it.

    Args:
        router (`nn.Module`): only read.
        block (`MoeBlock`): where it is.
    """

    def __init__(self, router: nn.Module, block: MoeBlock) -> None:
        self.router = router
        self.block = block
        self.larger = LargerRouter(router, block.num_experts)
        self.generator = torch.Generator().manual_seed(0)
        self.width = self.larger.weight_of(router).shape[-1]
        self.x = self._normal((NUM_TOKENS, self.width))
        parameters = dict(router.named_parameters())
        self.rest = {
            name: self._like(name, tensor, name in parameters)
            for name, tensor in [*parameters.items(), *router.named_buffers()]
            if name not in self.larger.axes
        }

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device="cpu").normal_(generator=self.generator)

    def _like(self, name: str, tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
        """Made-up entries of a tensor: scales are around 1, all else is around 0."""
        if is_parameter and tensor.dim() == 1 and not name.endswith("bias"):
            return torch.empty(tensor.shape, device="cpu").uniform_(0.5, 1.5, generator=self.generator)
        return torch.zeros(tensor.shape, device="cpu")

    def _per_expert(self, num_experts: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Made-up tensors of the router with an entry for each expert, and what its block hands to it."""
        parameters = dict(self.router.named_parameters())
        tensors = {}
        for name, axis in self.larger.axes.items():
            old = parameters[name] if name in parameters else self.router.get_buffer(name)
            shape = tuple(num_experts if i == axis else size for i, size in enumerate(old.shape))
            if name == self.larger.weight_name:
                tensors[name] = self.width**-0.5 * self._normal(shape)
            elif name in parameters and not name.endswith("bias") and "correction" not in name:
                tensors[name] = self._like(name, torch.empty(shape, device="cpu"), True)
            else:
                tensors[name] = 0.1 * self._normal(shape)
        return tensors, [] if self.block.correction is None else [0.1 * self._normal((num_experts,))]

    def run(self, num_experts: int, *, has_offset: bool = False) -> RouterOutput | str:
        """Its decision about made-up tokens, or a sentence that says how it failed."""
        tensors, corrections = self._per_expert(num_experts)
        x = self.x
        if has_offset:
            x = nn.functional.pad(x, (0, 1), value=1.0)
            weight = tensors[self.larger.weight_name]
            tensors[self.larger.weight_name] = nn.functional.pad(weight, (0, 1))
        return self._call(tensors, x, corrections, num_experts)

    @torch.no_grad()
    def _call(
        self, tensors: dict[str, torch.Tensor], x: torch.Tensor, corrections: list[torch.Tensor], num_experts: int
    ) -> RouterOutput | str:
        width = None if x.shape[-1] == self.width else x.shape[-1]
        copied = self.larger.copied(
            self.router, {**self.rest, **tensors}, num_experts=num_experts, width=width, is_bare=True
        )
        try:
            try:
                output = copied(x, *corrections)
            except ValueError:  # some read the shape of a batch
                output = copied(x[None], *corrections)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            new = num_experts - self.block.num_experts
            return f"cannot run with {self.block.num_experts} + {new} experts: {str(error).splitlines()[0]}"
        return read_decision(output, num_experts)

    def ignores(self, pads: Pads) -> bool:
        """Whether no token chooses a pad behind any group, and the weights of all other experts stay the same.

        For half of the tokens all other logits lie far below 0, which is that of the row of a pad, for the others far above:
        of many experts random logits have one above 0 for almost every token, and a pad would look unreachable.
        """
        num_experts, groups = self.block.num_experts, self.larger.groups
        tensors, corrections = self._per_expert(num_experts)
        x = self.x.clone()
        weight_name = self.larger.weight_name
        tensors[weight_name][:, 0] = SHIFT**0.5
        x[:, 0] = SHIFT**0.5 * torch.tensor([-1.0, 1.0]).repeat(NUM_TOKENS // 2)
        padded = {
            name: pads.fill(tensor, self.larger.axes[name], groups, groups, **{"value": 0.0} if name == weight_name else {})
            for name, tensor in tensors.items()
        }
        plain = self._call(tensors, x, corrections, num_experts)
        filled = [pads.fill(entry, 0, groups, groups) for entry in corrections]
        found = self._call(padded, x, filled, num_experts + groups)
        if isinstance(plain, str) or isinstance(found, str):
            return False
        is_old = in_groups([torch.ones(num_experts), torch.zeros(groups)], 0, groups).bool()
        expected, weights = _weights_of_experts(plain, num_experts), _weights_of_experts(found, num_experts + groups)
        is_reached = bool(weights[:, ~is_old].any())
        return not is_reached and torch.allclose(weights[:, is_old], expected, rtol=1e-4, atol=1e-6)


def _weights_of_experts(decision: RouterOutput, num_experts: int) -> torch.Tensor:
    """`(T, E)`: the weight that each expert gets, 0 where it is not chosen."""
    assert decision.top_k_weights is not None
    weights, index = (
        entry.reshape(NUM_TOKENS, -1) for entry in (decision.top_k_weights.float(), decision.top_k_index)
    )
    return torch.zeros(NUM_TOKENS, num_experts).scatter_add(1, index, weights)


def _is_probability(scores: torch.Tensor) -> bool:
    sums = scores.float().sum(dim=-1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _scoring(decision: RouterOutput) -> Scoring | None:
    """The rule that the weights of a decision follow; `None` if it is neither softmax nor sigmoid."""
    assert decision.top_k_weights is not None
    weights = decision.top_k_weights.float()
    total = weights.sum(dim=-1)
    is_normalized = bool(torch.allclose(total, total.mean().expand_as(total), rtol=1e-4))
    for is_sigmoid in (False, True):
        scoring = Scoring(is_sigmoid, is_normalized, is_single=weights.shape[-1] == 1)
        ratio = weights / scoring.probabilities(decision.router_logits).gather(-1, decision.top_k_index)
        expected = ratio[:, :1] if is_normalized else ratio[:1, :1]
        if torch.allclose(ratio, expected.expand_as(ratio), rtol=1e-3):
            return scoring
    return None
