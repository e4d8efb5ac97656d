"""How clusters come into a model: as `cluster_ids` of its calls, or from its prompts by `attach_encoder`.

All that MoCLE does to modules of others stands here. It puts a `forward` and a `generate` of its own into the
`__dict__` of the base model, since signatures are looked at: `Trainer` drops the columns of a dataset that `forward`
does not name, and `generate` refuses arguments that `forward` does not take. A hook could hand the ids over, but not
name them; and whole prompts, to which the ids belong, are seen only in the call of `generate` and not in its steps.
Everything else goes by the hooks of the forward context.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...routing_recorder import RoutingRecorder, get_recorder
from ...sequence_state import of_continued_cache
from .clustering import as_encoder, nearest_centroid
from .clusters import CLUSTER_IDS, GENERATION_PROMPT, ClusterLookup, remember_clusters
from .encoder import SentenceEncoder
from .instructions import PromptReader
from .layer import lookups_of


_METHODS = ("forward", "generate")
_MARK = "_is_mocle_entrance"
_PASSED_ON = ("input_ids", "attention_mask", "position_ids")
MAX_REMEMBERED = 100_000


def open_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Make `forward` and `generate` of `base_model` accept `cluster_ids`; calling it again does nothing.

    The ids go to the routers through the recorder and never reach the model itself. `forward` gets a signature that
    names them, for `Trainer` drops the columns of a dataset that it does not find there. Pickle keeps no method of an
    instance: a whole model that went through `torch.save` takes `cluster_ids` in its call, but not in `generate`.
    """
    recorder.context.extra_inputs.add(CLUSTER_IDS)
    if remember_clusters not in recorder.context.output_hooks:
        recorder.context.output_hooks.append(remember_clusters)
    for name in _METHODS:
        if hasattr(base_model, name) and not _is_ours(base_model, name) and not _is_ours(base_model, f"_old_{name}"):
            # a method of the instance, and none that holds the instance: copies of the model must call themselves
            base_model.__dict__[_before(name)] = base_model.__dict__.get(name)
            base_model.__dict__[name] = _METHOD_MAKERS[name](base_model)


def close_entrance(base_model: nn.Module, recorder: RoutingRecorder) -> None:
    """Undo [`open_entrance`]. Where accelerate has put a hook around our method it stays, and only passes on."""
    recorder.context.extra_inputs.discard(CLUSTER_IDS)
    if remember_clusters in recorder.context.output_hooks:
        recorder.context.output_hooks.remove(remember_clusters)
    for name in _METHODS:
        if _is_ours(base_model, f"_old_{name}"):
            continue
        before = base_model.__dict__.pop(_before(name), None)
        if _is_ours(base_model, name):
            del base_model.__dict__[name]
            if before is not None:
                base_model.__dict__[name] = before


def _is_ours(model: nn.Module, attribute: str) -> bool:
    """Whether an attribute of the instance is one of the methods below; accelerate keeps what it hooks as `_old_…`."""
    return hasattr(model.__dict__.get(attribute), _MARK)


def _before(name: str) -> str:
    return f"_mocle_{name}_before"


def _call_inner(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method that was there before: one set on the instance (by trl, accelerate), or that of the class.

    Not by way of a bound method: a compiler that stops in the middle would look it up by its name again and find ours.
    """
    before = model.__dict__.get(_before(name))
    return before(*args, **kwargs) if before is not None else getattr(type(model), name)(model, *args, **kwargs)


def _forward_method(model: nn.Module) -> Any:
    def forward(self: nn.Module, *args: Any, cluster_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        recorder = get_recorder(self)
        if cluster_ids is None or recorder is None:
            return _call_inner(self, "forward", *args, **kwargs)
        # called without hooks: model.forward(...)
        inputs = {name: kwargs[name] for name in _PASSED_ON if name in kwargs}
        with recorder.context.surround({**inputs, CLUSTER_IDS: cluster_ids}):
            return _call_inner(self, "forward", *args, **kwargs)

    setattr(forward, _MARK, True)
    forward.__signature__ = _with_cluster_ids(inspect.signature(model.forward))  # type: ignore[attr-defined]
    return forward.__get__(model)


def _generate_method(model: nn.Module) -> Any:
    signature = inspect.signature(model.generate)

    def generate(self: nn.Module, *args: Any, cluster_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        recorder = get_recorder(self)
        if recorder is None:
            return _call_inner(self, "generate", *args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        prompt = {name: given.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds")}
        if prompt["input_ids"] is None and getattr(given.get("inputs"), "dtype", None) in (torch.int64, torch.int32):
            prompt["input_ids"] = given["inputs"]
        continued = of_continued_cache(given.get("past_key_values"))
        with recorder.context.surround({CLUSTER_IDS: cluster_ids, GENERATION_PROMPT: prompt, **continued}):
            return _call_inner(self, "generate", *args, **kwargs)

    setattr(generate, _MARK, True)
    generate.__signature__ = _with_cluster_ids(signature)  # type: ignore[attr-defined]
    generate.__doc__ = model.generate.__doc__
    return generate.__get__(model)


_METHOD_MAKERS = {"forward": _forward_method, "generate": _generate_method}


def _with_cluster_ids(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a bound method, with `self` and with `cluster_ids` as its last named argument."""
    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ids = inspect.Parameter(
        CLUSTER_IDS, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.LongTensor | None"
    )
    parameters = [p for p in signature.parameters.values() if p.name != CLUSTER_IDS]
    is_last = [p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters]
    position = is_last.index(True) if True in is_last else len(parameters)
    return signature.replace(parameters=[myself, *parameters[:position], ids, *parameters[position:]])


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
    """Autocast of the model's pass would reach the encoder, whose vectors were float32 when they were clustered."""
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

    Where no `cluster_ids` are given, the instruction is read from `input_ids` (in a chat, the first user turn),
    encoded, and goes to its nearest centroid; decoding steps keep what was found for the prompt. `cluster_ids` that
    are given count as before. An adapter that is added later with the same clustering takes the encoder over, as the
    reference adapter does that trl adds.

    Args:
        model (`nn.Module`):
            A model with MoCLE adapters that carry centroids: a `PeftModel`, or one with adapters loaded by
            transformers.
        encoder (`str` or `SentenceEncoder`, *optional*):
            The sentence encoder of the clustering: its id on the Hub, a folder, or the object. By default the name
            that the adapter carries.
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
    lookups = _lookups_with_centroids(model, adapter_name)
    processor = tokenizer if tokenizer is not None else _tokenizer_of(model)
    for lookup in lookups:
        config = lookup.config
        name = encoder if encoder is not None else config.encoder_name
        if name is None:
            raise ValueError(f"The adapter {lookup.adapter_name!r} names no sentence encoder. Give one: encoder=...")
        sentence_encoder = as_encoder(name)
        lookup.check_centroids()
        assert lookup.centroids is not None
        centroids = lookup.centroids.weight.detach().float().cpu()
        if sentence_encoder.embedding_dim != centroids.shape[1]:
            raise ValueError(
                f"The encoder {sentence_encoder.name_or_path!r} makes vectors of width "
                f"{sentence_encoder.embedding_dim}, but the centroids of the adapter {lookup.adapter_name!r} are "
                f"{centroids.shape[1]} wide. Use the encoder of the clustering, {config.encoder_name!r}."
            )
        reader = PromptReader(processor, instruction_pattern=config.instruction_pattern)
        lookup.finder = PromptClusters(
            reader, sentence_encoder, template=config.instruction_template, centroids=centroids
        )


def _lookups_with_centroids(model: nn.Module, adapter_name: str | None) -> list[ClusterLookup]:
    lookups = [lookup for lookup in lookups_of(model) if adapter_name in (None, lookup.adapter_name)]
    if not lookups:
        names = sorted({lookup.adapter_name for lookup in lookups_of(model)})
        raise ValueError(
            f"The model has no MoCLE adapter{f' {adapter_name!r}' if adapter_name else ''} (it has {names}). Add one "
            "by get_peft_model(model, MoCLEConfig.from_clusterer(...)), or load one."
        )
    if not (found := [lookup for lookup in lookups if lookup.centroids is not None]):
        raise ValueError(
            f"The MoCLE adapter {lookups[0].adapter_name!r} carries no centroids, so that the clusters of prompts "
            "cannot be found. Make it from a clustering, by MoCLEConfig.from_clusterer(...); or pass cluster_ids."
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
