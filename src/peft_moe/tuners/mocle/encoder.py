"""`SentenceEncoder`: texts to vectors, by sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


class SentenceEncoder:
    """Turns texts into vectors with a sentence encoder from the Hub or a folder. It is loaded on first use.

    A thin wrapper around `sentence_transformers.SentenceTransformer` (`pip install peft-moe[cluster]`): pooling,
    normalisation, maximum length and prompts are those that the files of the encoder name. It computes in float32
    whatever the weights are stored in, and reads weights from safetensors files only. Copies and pickles hold the
    name, not the weights.

    Args:
        name_or_path (`str` or `Path`):
            Id on the Hub, such as `"sentence-transformers/all-MiniLM-L6-v2"`, or a folder.
        device (`str` or `torch.device`, *optional*):
            Where it runs. By default the accelerator, if there is one.

    Example:

    ```py
    >>> encoder = SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2")
    >>> encoder.encode(["What colour is the car?", "Sort a list in Python."]).shape
    torch.Size([2, 384])
    ```
    """

    def __init__(self, name_or_path: str | Path, *, device: str | torch.device | None = None) -> None:
        self.name_or_path = str(name_or_path)
        self.device = device
        self._model: Any = None

    @cached_property
    def embedding_dim(self) -> int:
        """Width C of the vectors. Loads the encoder."""
        return int(self.encode(["width"]).shape[1])

    def encode(self, texts: Sequence[str], *, batch_size: int = 64, show_progress: bool = False) -> torch.Tensor:
        """Vectors of `texts`, in their order.

        Args:
            texts (`Sequence[str]`): N texts. What goes beyond the maximum length of the encoder is cut off.
            batch_size (`int`): texts per forward pass. Texts of similar length run together.
            show_progress (`bool`): show a progress bar.

        Returns:
            `torch.Tensor`: shape `(N, C)`, float32, on the CPU.

        Raises:
            ValueError: no texts, or something else than a list of them.
            ImportError: sentence-transformers is not installed.
            OSError: the encoder is neither a folder, nor in the cache, nor found on the Hub; or it has no safetensors
                file.
        """
        if isinstance(texts, str) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"encode takes a list of at least one text, but got {str(texts)[:80]!r}.")
        vectors = self._loaded().encode(
            list(texts), batch_size=batch_size, show_progress_bar=show_progress, convert_to_numpy=True
        )
        return torch.from_numpy(vectors)

    def _loaded(self) -> Any:
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ModuleNotFoundError as error:
                raise ImportError(
                    "Instructions become vectors by sentence-transformers, which is not installed. Run "
                    "`pip install peft-moe[cluster]`; or give the clusters yourself, as cluster_ids."
                ) from error
            device = None if self.device is None else str(self.device)
            try:
                model = SentenceTransformer(
                    self.name_or_path, device=device, model_kwargs={"use_safetensors": True, "dtype": torch.float32}
                )
            except OSError as error:
                raise OSError(
                    f"The sentence encoder {self.name_or_path!r} could not be loaded ({error}). Check the name and "
                    "the network (is HF_HUB_OFFLINE set?), or give the folder of a copy with safetensors weights."
                ) from error
            self._model = model.eval().requires_grad_(False)
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        # without what the first use adds: datasets recognises a finished map by the pickle of its function
        return {name: value for name, value in self.__dict__.items() if name != "embedding_dim"} | {"_model": None}

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name_or_path!r})"
