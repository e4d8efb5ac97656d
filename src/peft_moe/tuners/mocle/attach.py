"""`attach_encoder`: a model with a MoCLE adapter finds the clusters of its prompts by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...routing import ClusterCentroids
from .clusters import ClusterLookup
from .instructions import PromptReader
from .clustering import nearest_centroid
from .layer import lookups_of
from .encoder import SentenceEncoder


MAX_REMEMBERED = 100_000


class PromptClusters:
    """Finds the cluster of each prompt in a batch: token ids → instruction → sentence embedding → nearest centroid.

    Texts are remembered, so that an epoch or the answers to one prompt do not encode it again.

    Args:
        reader (`PromptReader`): reads the instructions out of token ids.
        encoder (`SentenceEncoder`): that of the clustering.
        template (`str`): the text that is encoded, `"{}"` is the instruction.
        centroids (`torch.Tensor` of shape `(K, C)`): those of the clustering.
    """

    def __init__(
        self, reader: PromptReader, encoder: SentenceEncoder, *, template: str, centroids: torch.Tensor
    ) -> None:
        self.reader = reader
        self.encoder = encoder
        self.template = template
        self.centroids = centroids
        self._known: dict[str, int] = {}

    @torch.compiler.disable
    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The clusters `(N,)` of `input_ids` `(B, S)`; N is B, or the number of packed examples."""
        input_ids = inputs["input_ids"]
        mask, labels = (_fitting(inputs.get(name), input_ids) for name in ("attention_mask", "labels"))
        position_ids = _fitting(inputs.get("position_ids"), input_ids)
        if mask is None and position_ids is not None and int(position_ids.eq(0).sum()) > len(input_ids):
            rows = _unpacked(input_ids, labels, position_ids, self.reader.tokenizer.pad_token_id)
            texts = [text for row in rows for text in self.reader.read(*row)]
        else:
            texts = self.reader.read(input_ids, mask, labels)
        return self.predict(texts).to(input_ids.device)

    def predict(self, texts: list[str]) -> torch.Tensor:
        """The clusters `(N,)` of N instructions, int64."""
        new = sorted({text for text in texts if text not in self._known})
        if new:
            if len(self._known) + len(new) > MAX_REMEMBERED:
                self._known = {}
                new = sorted(set(texts))
            # not an inference tensor: the ids may be needed in training
            with torch.inference_mode(False), _without_autocast():
                embeddings = self.encoder.encode([self.template.replace("{}", text) for text in new])
                found = nearest_centroid(embeddings, self.centroids)
            self._known.update(zip(new, found.tolist(), strict=True))
        with torch.inference_mode(False):
            return torch.tensor([self._known[text] for text in texts], dtype=torch.int64)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """The precision of the model's pass is none of the encoder's business."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _fitting(tensor: Any, input_ids: torch.Tensor) -> torch.Tensor | None:
    """`tensor` if it says something about each token."""
    return tensor if isinstance(tensor, torch.Tensor) and tensor.shape == input_ids.shape else None


def _unpacked(
    input_ids: torch.Tensor, labels: torch.Tensor | None, position_ids: torch.Tensor, pad_token_id: int | None
) -> list[tuple[torch.Tensor, None, torch.Tensor | None]]:
    """The examples that are packed into rows, each a batch of one; padding at the end of a row is left out."""
    examples = []
    for row, positions in enumerate(position_ids):
        starts = positions.eq(0).nonzero().flatten().tolist()
        end = len(positions)
        while len(starts) > 1 and starts[-1] == end - 1 and input_ids[row, end - 1] == pad_token_id:
            end = starts.pop()
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            part = slice(start, stop)
            examples.append(
                (input_ids[row : row + 1, part], None, None if labels is None else labels[row : row + 1, part])
            )
    return examples


def attach_encoder(
    model: nn.Module,
    encoder: str | SentenceEncoder | None = None,
    *,
    tokenizer: Any = None,
    adapter_name: str | None = None,
) -> None:
    """Let a model with a MoCLE adapter route its prompts by itself, in `forward`, `generate` and pipelines.

    Where no `cluster_ids` are given, the instruction is read from `input_ids` (in a chat, the first user turn), encoded,
    and goes to its nearest centroid; decoding steps keep what was found for the prompt. `cluster_ids` that are given
    count as before. An adapter that is added later with the same clustering takes the encoder over, as the reference
    adapter does that trl adds.

    Args:
        model (`nn.Module`):
            A model with MoCLE adapters that carry centroids: a `PeftModel`, or one with adapters loaded by transformers.
        encoder (`str` or `SentenceEncoder`, *optional*):
            The sentence encoder of the clustering: its id on the Hub, a folder, or the object. By default the name that
            the adapter carries.
        tokenizer (*optional*):
            Tokenizer or processor of `model`, to read its `input_ids`. By default the one beside the base model.
        adapter_name (`str`, *optional*):
            Only this adapter. By default all that carry centroids.

    Raises:
        ValueError: there is no such adapter, it carries no centroids, the encoder's vectors are of another width than
            the centroids, or the tokenizer cannot be found.

    Example:

    ```py
    >>> model = AutoPeftModelForCausalLM.from_pretrained("me/my-mocle-adapter")
    >>> attach_encoder(model)
    >>> pipeline("text-generation", model=model, tokenizer=tokenizer)("What colour is the sky?")
    ```
    """
    lookups = _lookups(model, adapter_name)
    processor = tokenizer if tokenizer is not None else _tokenizer_of(model)
    for lookup, known in lookups.items():
        config = lookup.config
        name = encoder if encoder is not None else config.encoder_name
        if name is None:
            raise ValueError(f"The adapter {lookup.adapter_name!r} names no sentence encoder. Give one: encoder=...")
        sentence_encoder = name if isinstance(name, SentenceEncoder) else SentenceEncoder(name)
        lookup.check_centroids()
        centroids = known.weight.detach().float().cpu()
        if sentence_encoder.embedding_dim != centroids.shape[1]:
            raise ValueError(
                f"The encoder {sentence_encoder.name_or_path!r} makes vectors of width {sentence_encoder.embedding_dim}, "
                f"but the centroids of the adapter {lookup.adapter_name!r} are {centroids.shape[1]} wide. Use the "
                f"encoder of the clustering, {config.encoder_name!r}."
            )
        reader = PromptReader(processor, instruction_pattern=config.instruction_pattern)
        lookup.finder = PromptClusters(
            reader, sentence_encoder, template=config.instruction_template, centroids=centroids
        )


def _lookups(model: nn.Module, adapter_name: str | None) -> dict[ClusterLookup, ClusterCentroids]:
    """What finds clusters for each adapter that carries centroids, with those."""
    lookups = lookups_of(model)
    names = sorted({lookup.adapter_name for lookup in lookups})
    if adapter_name is not None and adapter_name not in names or not names:
        raise ValueError(
            f"The model has no MoCLE adapter{f' {adapter_name!r}' if adapter_name else ''} (it has {names}). Add one by "
            "get_peft_model(model, MoCLEConfig.from_clusterer(...)), or load one."
        )
    chosen = [lookup for lookup in lookups if adapter_name in (None, lookup.adapter_name)]
    found = {lookup: lookup.centroids for lookup in chosen if lookup.centroids is not None}
    if not found:
        raise ValueError(
            f"The MoCLE adapter {adapter_name or names[0]!r} carries no centroids, so that the clusters of prompts cannot "
            "be found. Make it from a clustering, by MoCLEConfig.from_clusterer(...); or pass cluster_ids."
        )
    return found


def _tokenizer_of(model: nn.Module) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    for auto_class in (AutoProcessor, AutoTokenizer) if name else ():
        try:
            return auto_class.from_pretrained(name)
        except (OSError, ValueError, ImportError):
            continue
    raise ValueError(
        f"The tokenizer of the base model could not be found (its name is {name!r}). Give it: tokenizer=..."
    )
