"""How text and image tokens share the experts: pure functions on counts, both modalities with equal weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .expert_load import IMAGE, TEXT, ExpertLoad
from .summary import load_shares


@dataclass(frozen=True)
class ModalityShares:
    """How the text tokens and the image tokens of one router share its experts.

    Args:
        text (`list[float]`), image (`list[float]`):
            Share of each expert among the choices of the modality, E values each that sum to 1.
    """

    text: list[float]
    image: list[float]

    @property
    def balanced(self) -> list[float]:
        """Share of each expert where text counts are rescaled to as many as image counts; sums to 1."""
        return [(text + image) / 2 for text, image in zip(self.text, self.image, strict=True)]

    @property
    def image_fraction(self) -> list[float]:
        """What part of an expert's tokens are image tokens, after the same rescaling; `nan` for an expert without any.

        0.5 is an expert that makes no difference between the modalities.
        """
        return [
            image / (text + image) if text + image else math.nan
            for text, image in zip(self.text, self.image, strict=True)
        ]

    @property
    def distance(self) -> float:
        """Total variation between the two: 0 if experts get both alike, 1 if no expert gets both."""
        return sum(abs(text - image) for text, image in zip(self.text, self.image, strict=True)) / 2


def modality_shares(load: ExpertLoad, *, adapter: str | None = None) -> dict[str, ModalityShares]:
    """Shares of text and image tokens, router by router (MoE-LLaVA, figures 4 and 5).

    The paper takes the best expert of each token, as `ExpertPathways.expert_load()` counts, and the mean of the ratios
    of single samples; these are ratios of counts over all tokens, so that a long sample weighs more than a short one.

    Args:
        load (`ExpertLoad`): counts by token group.
        adapter (`str`, *optional*): only this adapter.

    Raises:
        ValueError: nothing was counted, or no router saw tokens of both kinds.
    """
    text = load.by_router(adapter=adapter, token_group=TEXT)
    image = load.by_router(adapter=adapter, token_group=IMAGE)
    shares = {
        name: ModalityShares(load_shares(counts), load_shares(image[name]))
        for name, counts in text.items()
        if any(counts) and any(image.get(name, ()))
    }
    if not shares:
        found = sorted({group for group in load.token_groups if load.summary(adapter=adapter, token_group=group)})
        raise ValueError(
            f"Modalities can be compared where routers saw text and image tokens, but {_described(found)}. The config "
            "needs image_token_id (or image_token_index), and calls need input_ids with image tokens."
        )
    return shares


def _described(token_groups: Sequence[str]) -> str:
    if not token_groups:
        return "no token was counted"
    return "counted were only tokens of " + ", ".join(f"group {group!r}" for group in token_groups)
