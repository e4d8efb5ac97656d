"""Which cluster each example of a forward pass belongs to: given as `cluster_ids`, or found from the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...forward_context import ForwardContext, ForwardPass
from ...routing import ClusterCentroids
from ...sequence_state import sequence_state
from .config import MoCLEConfig


CLUSTER_IDS = "cluster_ids"
GENERATION_PROMPT = "generation_prompt"

# inputs of the model by name -> (N,) int64
ClusterFinder = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(eq=False)
class BatchClusters:
    """The clusters of the N examples of a batch. One object per forward pass, so that it identifies the pass.

    Args:
        ids (`torch.Tensor` of shape `(N,)`, int64, or `None`):
            `None`: not known, every example uses the universal expert.
        segments (`torch.Tensor` of shape `(T,)`, int64, *optional*):
            The example of each token, where several are packed into one row.
        is_expandable (`bool`):
            Whether a batch may be a multiple of N, each example repeated side by side (beams, several answers).
    """

    ids: torch.Tensor | None
    segments: torch.Tensor | None = None
    is_expandable: bool = False
    on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def ids_on(self, device: torch.device) -> torch.Tensor:
        """The ids on the device of a layer; for models that are spread over several."""
        assert self.ids is not None
        if self.ids.device == device:
            return self.ids
        if device not in self.on_device:
            self.on_device[device] = self.ids.to(device)
        return self.on_device[device]

    def rows(self, shape: torch.Size, batch_shape: torch.Size | None, module_name: str) -> tuple[int, int]:
        """How a layer's input splits into `(examples, tokens per example)`.

        Args:
            shape (`torch.Size`): that of the input without its last axis.
            batch_shape (`torch.Size`, *optional*): examples and tokens of the running pass, where they are known.
            module_name (`str`): for the error.

        Raises:
            ValueError: it does not.
        """
        first, num_tokens = (shape[0] if shape else 1), shape.numel()
        if self.ids is None:
            return (first, num_tokens // first) if len(shape) > 1 and first else (num_tokens, 1)
        num_examples = self.ids.shape[0]
        if len(shape) == 1 and first != num_examples and batch_shape is not None and num_tokens == batch_shape.numel():
            first = batch_shape[0]  # a model that flattens its tokens
        if first == num_examples or (self.is_expandable and first % num_examples == 0):
            return first, num_tokens // first
        raise ValueError(
            f"cluster_ids has {num_examples} entries, but '{module_name}' got a batch of {first} (shape "
            f"{tuple(shape)}). Pass one cluster id per example, as an int64 tensor of shape (batch,); for packed rows "
            "one per packed example, together with position_ids that start again at 0. A layer that sees other inputs "
            "than the examples cannot be routed: exclude it with exclude_modules."
        )


class ClusterLookup:
    """Finds the clusters of a batch for one adapter; shared by all its layers.

    Args:
        adapter_name (`str`), config (`MoCLEConfig`): which adapter.
        finder (`Callable`, *optional*): finds ids in the inputs of a pass; set by `attach_encoder`.
    """

    def __init__(self, adapter_name: str, config: MoCLEConfig, *, finder: ClusterFinder | None = None) -> None:
        self.adapter_name = adapter_name
        self.config = config
        self.finder = finder
        self.centroids: ClusterCentroids | None = None
        """those that the adapter carries"""
        self._has_checked_centroids = False

    def check_centroids(self) -> None:
        """Raise `ValueError` where the configuration names centroids that were neither given nor loaded."""
        if self.centroids is not None and not self.centroids.are_known:
            raise ValueError(
                f"The configuration of the MoCLE adapter {self.adapter_name!r} names centroids (centroids_sha256), "
                "but they were neither given nor loaded. Make the configuration from the clustering, by "
                "MoCLEConfig.from_clusterer(...), or load the whole adapter, by PeftModel.from_pretrained(...)."
            )

    def of_running_pass(self, context: ForwardContext) -> BatchClusters:
        """The clusters of what is being computed, worked out once per pass.

        Raises:
            ValueError: they are not known and there is no fallback, or they make no sense.
        """
        forward_pass = context.find_pass()
        if forward_pass is None:
            if self.config.fallback == "universal":
                return BatchClusters(None)
            raise ValueError(
                f"The clusters of this batch are not known to the MoCLE adapter {self.adapter_name!r}: a part of the "
                "model was called, and not the model itself. Call the model, or pass fallback='universal' in the "
                "configuration."
            )
        forward_pass.keep_for_backward()
        if not self._has_checked_centroids and not torch.compiler.is_compiling():
            self.check_centroids()
            self._has_checked_centroids = True
        holder = self._holder(forward_pass)
        if self not in holder.state:
            holder.state[self] = self._find(holder.inputs)
        clusters: BatchClusters = holder.state[self]
        forward_pass.state[self] = clusters
        return clusters

    def _holder(self, forward_pass: ForwardPass) -> ForwardPass:
        """What the clusters belong to: the pass, or the whole generation that it is a step of."""
        surrounding = forward_pass.surrounding
        if surrounding is None or self in forward_pass.state:
            return forward_pass
        is_its_own = forward_pass.inputs.get(CLUSTER_IDS) is not surrounding.inputs.get(CLUSTER_IDS)
        return forward_pass if is_its_own else surrounding

    def _find(self, inputs: dict[str, Any]) -> BatchClusters:
        ids = inputs.get(CLUSTER_IDS)
        if ids is None:
            state = inputs.get("sequence_state")
            remembered = None if state is None else state.get((CLUSTER_IDS, self.adapter_name))
            prompt = _prompt(inputs)
            if self.finder is not None and prompt is not None:
                ids = self.finder(prompt)
            elif remembered is not None:
                return BatchClusters(remembered, is_expandable=True)
        if ids is None:
            if self.config.fallback == "universal":
                return BatchClusters(None)
            raise ValueError(
                f"The MoCLE adapter {self.adapter_name!r} needs the cluster of each example, but got no cluster_ids. "
                "Pass cluster_ids, an int64 tensor of shape (batch,), with the batch or to generate (add a column to "
                "a dataset by InstructionClusterer.add_cluster_ids); or let it find them from input_ids: "
                "attach_encoder(model); or choose fallback='universal' in the configuration."
            )
        prompt = inputs.get(GENERATION_PROMPT)
        ids = self._checked(ids, like=(prompt or inputs).get("input_ids"))
        if prompt is None:
            return BatchClusters(ids, _segments(ids, inputs))
        for tokens in (prompt.get("input_ids"), prompt.get("inputs_embeds")):
            if isinstance(tokens, torch.Tensor) and tokens.shape[0] != ids.shape[0]:
                raise ValueError(
                    f"cluster_ids has {ids.shape[0]} entries, but generate got {tokens.shape[0]} prompts. Pass one id "
                    "per prompt; beams and several answers to a prompt share it."
                )
        return BatchClusters(ids, is_expandable=True)

    def _checked(self, ids: Any, *, like: Any) -> torch.Tensor:
        if not isinstance(ids, torch.Tensor):
            raise ValueError(
                f"cluster_ids must be a tensor, but is {type(ids).__name__}. Use torch.tensor(cluster_ids)."
            )
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise ValueError(
                f"cluster_ids must be whole numbers, but is {ids.dtype}. Pass the ids that "
                "InstructionClusterer.predict returns, or cluster_ids.long()."
            )
        if ids.dim() != 1 or ids.shape[0] == 0:
            raise ValueError(
                f"cluster_ids must have the shape (batch,), one id per example, but is {tuple(ids.shape)}. Use "
                "cluster_ids.reshape(-1)."
            )
        if isinstance(like, torch.Tensor) and like.device != ids.device:
            raise ValueError(
                f"cluster_ids is on {ids.device}, but input_ids on {like.device}. Use "
                f"cluster_ids.to({str(like.device)!r})."
            )
        if ids.device.type != "meta" and not torch.compiler.is_compiling():
            smallest, largest = (int(bound) for bound in torch.aminmax(ids))
            if smallest < 0 or largest >= self.config.num_clusters:
                raise ValueError(
                    f"cluster_ids must be between 0 and {self.config.num_clusters - 1} "
                    f"(num_clusters={self.config.num_clusters}), but holds {smallest if smallest < 0 else largest}. "
                    "They come from another clustering; predict them with the clusterer that the adapter was made "
                    "from."
                )
        return ids.long()


def _prompt(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs that hold whole prompts: those of `generate`, or those of this pass unless it continues a cache."""
    if GENERATION_PROMPT in inputs:
        inputs = inputs[GENERATION_PROMPT]
    elif inputs.get("num_cached_tokens"):
        return None
    return inputs if isinstance(inputs.get("input_ids"), torch.Tensor) else None


def _segments(ids: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The example of each token where rows hold several examples, told by position_ids that start again at 0.

    Tokens that pad a packed row at its end, all with position 0, follow the last example.
    """
    position_ids = inputs.get("position_ids")
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2 or position_ids.shape[0] == ids.shape[0]:
        return None
    starts = position_ids.eq(0)
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == starts.shape:
        starts = starts & mask.ne(0)
    starts = starts.flatten()
    segments = starts.cumsum(0) - 1
    num_examples = ids.shape[0]
    is_padding = segments >= num_examples
    if int(segments[-1]) + 1 < num_examples or int(segments[0]) < 0 or bool((is_padding & ~starts).any()):
        return None
    return segments.clamp(max=num_examples - 1).to(ids.device)


def remember_clusters(context: ForwardContext, forward_pass: ForwardPass, output: Any) -> Any:
    """Output hook: leave the clusters of a prompt on its key-value cache, for decoding loops that pass only tokens."""
    cache = getattr(output, "past_key_values", None)
    if cache is None or torch.compiler.is_compiling():
        return output
    for key, clusters in forward_pass.state.items():
        if not isinstance(key, ClusterLookup) or clusters.ids is None or clusters.segments is not None:
            continue
        state = sequence_state(cache, create=True)
        if state is not None:
            # beams of an example stand side by side in the cache
            batch = forward_pass.inputs.get("batch_shape", clusters.ids.shape)[0]
            repeats = max(1, batch // clusters.ids.shape[0])
            ids = clusters.ids if repeats == 1 else clusters.ids.repeat_interleave(repeats)
            state.keep((CLUSTER_IDS, key.adapter_name), ids)
    return output


class ClusterIdsCollator:
    """Wraps a collator that knows nothing of `cluster_ids`, such as those of trl.

    The collators of transformers need no wrapper: they keep every column of numbers. trl's trainers drop the column
    even before the collator, unless `remove_unused_columns=False`.

    Args:
        collator (`Callable`):
            Makes a batch from a list of examples.

    Returns:
        The batch of `collator`, with `cluster_ids` `(N,)` int64 added. An example that packs several has a list of
        ids; N counts all of them.

    Raises:
        ValueError: an example has no `cluster_ids`.

    Example:

    ```py
    >>> from trl import SFTConfig, SFTTrainer
    >>> from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    >>> collator = ClusterIdsCollator(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))
    >>> args = SFTConfig("out", remove_unused_columns=False)
    >>> trainer = SFTTrainer(model, args, train_dataset=dataset, data_collator=collator)
    ```
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        ids: list[int] = []
        for position, example in enumerate(examples):
            found = example.get(CLUSTER_IDS)
            if found is None:
                raise ValueError(
                    f"Example {position} of the batch has no cluster_ids, but only {sorted(example)}. Add the column "
                    "by InstructionClusterer.add_cluster_ids, and keep it: trl's trainers need "
                    "remove_unused_columns=False."
                )
            found = torch.as_tensor(found).reshape(-1).tolist()
            ids += found
        batch = self.collator([{k: v for k, v in example.items() if k != CLUSTER_IDS} for example in examples])
        batch[CLUSTER_IDS] = torch.tensor(ids)
        return batch
