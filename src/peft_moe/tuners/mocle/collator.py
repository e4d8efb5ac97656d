"""`ClusterIdsCollator`: keeps `cluster_ids` in a batch where a collator would drop them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .clusters import CLUSTER_IDS


class ClusterIdsCollator:
    """Wraps a collator that knows nothing of `cluster_ids`, such as those of trl.

    The collators of transformers need no wrapper: they keep every column of numbers. trl's trainers drop the column even
    before the collator, unless `remove_unused_columns=False`.

    Args:
        collator (`Callable`):
            Makes a batch from a list of examples.

    Returns:
        The batch of `collator`, with `cluster_ids` `(N,)` int64 added. An example that packs several has a list of ids;
        N counts all of them.

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
                    f"Example {position} of the batch has no cluster_ids, but only {sorted(example)}. Add the column by "
                    "InstructionClusterer.add_cluster_ids, and keep it: trl's trainers need remove_unused_columns=False."
                )
            found = torch.as_tensor(found).reshape(-1).tolist()
            ids += found
        batch = self.collator([{k: v for k, v in example.items() if k != CLUSTER_IDS} for example in examples])
        batch[CLUSTER_IDS] = torch.tensor(ids)
        return batch
