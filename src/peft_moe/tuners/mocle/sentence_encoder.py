"""`SentenceEncoder`: texts to vectors, by sentence-transformers where it is installed and by plain transformers else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...versions import installed_version


DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
NEEDED_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
INSTALL_HINT = "`pip install sentence-transformers` runs every encoder that it can load."
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
MEAN_POOLING_KEY = "pooling_mode_mean_tokens"


class SentenceEncoder:
    """Turns texts into vectors with a sentence encoder from the Hub or a folder. It is loaded on first use.

    With sentence-transformers installed that library does the work. Otherwise plain transformers does: mean over the
    tokens of each text, truncation and normalisation as the files of the encoder say (`modules.json`,
    `1_Pooling/config.json`, `sentence_bert_config.json`); without these files the mean, not normalised. Both give the
    same vectors. What plain transformers cannot do in this way is refused, never approximated.

    Weights are read from safetensors files only. Copies and pickles hold the name, not the weights.

    Args:
        name_or_path (`str` or `Path`):
            Id on the Hub, such as `"sentence-transformers/all-MiniLM-L6-v2"`, or a folder.
        device (`str` or `torch.device`, *optional*):
            Where it runs. By default the accelerator, if there is one.

    Raises:
        ValueError: `name_or_path` is a file.

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
        self._backend: _Backend | None = None
        if Path(self.name_or_path).is_file():
            raise ValueError(
                f"A sentence encoder is a folder or an id on the Hub, but {self.name_or_path!r} is a file. Give the "
                f"folder that holds it: {str(Path(self.name_or_path).parent)!r}."
            )

    @property
    def embedding_dim(self) -> int:
        """Width C of the vectors. Loads the encoder."""
        return self._loaded().embedding_dim

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64, show_progress: bool = False) -> torch.Tensor:
        """Vectors of `texts`, in their order.

        Args:
            texts (`Sequence[str]`): N texts. What goes beyond the maximum length of the encoder is cut off.
            batch_size (`int`): texts per forward pass. Texts of similar length run together.
            show_progress (`bool`): show a progress bar.

        Returns:
            `torch.Tensor`: shape `(N, C)`, float32, on the CPU.

        Raises:
            ValueError: no texts, a single string, or something else than strings; an encoder that cannot be run (the
                message says why and what to do); a `batch_size` below 1.
            OSError: the encoder is neither a folder, nor in the cache, nor to be had from the Hub.
        """
        from tqdm.auto import tqdm

        if isinstance(texts, str):
            raise ValueError(
                f"encode takes a list of texts, but got the single string {texts[:80]!r}. Wrap it: [text]."
            )
        if len(texts) == 0:
            raise ValueError("There is nothing to encode: the list of texts is empty.")
        if wrong := [index for index, text in enumerate(texts) if not isinstance(text, str)]:
            kind = type(texts[wrong[0]]).__name__
            raise ValueError(f"encode takes strings, but text {wrong[0]} is a {kind} ({len(wrong)} such texts).")
        if batch_size < 1:
            raise ValueError(f"batch_size has to be at least 1, but is {batch_size}.")
        backend = self._loaded()
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        vectors = torch.empty(len(texts), backend.embedding_dim)
        with tqdm(total=len(texts), desc="Encoding", unit="text", disable=not show_progress) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                vectors[chosen] = backend.encode([texts[index] for index in chosen]).float().cpu()
                bar.update(len(chosen))
        return vectors

    def _loaded(self) -> _Backend:
        if self._backend is None:
            folder = _encoder_folder(self.name_or_path)
            device = torch.device(self.device) if self.device is not None else _default_device()
            self._backend = make_backend(folder, device)
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": None}

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name_or_path!r})"


class _Backend(Protocol):
    """What runs an encoder: one batch of texts to vectors `(N, C)`."""

    embedding_dim: int

    def encode(self, texts: list[str]) -> torch.Tensor: ...


def make_backend(folder: Path, device: torch.device) -> _Backend:
    """Runs the encoder in `folder` by sentence-transformers if it is installed, else by plain transformers."""
    if installed_version("sentence-transformers") is not None:
        return SentenceTransformersBackend(folder, device)
    return TransformersBackend(folder, device)


class SentenceTransformersBackend:
    """An encoder run by sentence-transformers."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(
            str(folder), device=str(device), model_kwargs={"use_safetensors": True}, local_files_only=True
        )
        self._model.float().eval().requires_grad_(False)
        self.embedding_dim = int(self.encode(["width"]).shape[-1])

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Vectors `(N, C)`."""
        vectors: torch.Tensor = self._model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )
        return vectors


class TransformersBackend:
    """An encoder run by transformers alone: mean pooling over the attention mask, then normalisation if it is asked for.

    Raises:
        ValueError: the folder asks for something else.
        OSError: the folder has no model in the safetensors format.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        recipe = _Recipe.read(folder)
        config = AutoConfig.from_pretrained(recipe.transformer)
        _check_architecture(folder, config, is_bare=recipe.is_bare)
        self._model = AutoModel.from_pretrained(recipe.transformer, dtype=torch.float32, use_safetensors=True)
        self._model.to(device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(recipe.transformer)
        self._recipe = recipe
        lengths = [
            recipe.max_length or self._tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", -1),
        ]
        self._max_length = min(length for length in lengths if length > 0)
        self._device = device
        self.embedding_dim = int(config.hidden_size)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Vectors `(N, C)`."""
        recipe = self._recipe
        texts = [recipe.prompt + (text.lower() if recipe.lowers_case else text) for text in texts]
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        hidden_states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden_states.dtype)
        vectors = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return torch.nn.functional.normalize(vectors, dim=-1) if recipe.normalizes else vectors


@dataclass(frozen=True)
class _Recipe:
    """How an encoder's folder wants its transformer to be used."""

    transformer: Path
    is_bare: bool = True
    normalizes: bool = False
    max_length: int | None = None
    lowers_case: bool = False
    prompt: str = ""

    @classmethod
    def read(cls, folder: Path) -> _Recipe:
        modules = _read_json(folder / "modules.json")
        if not modules:
            return cls(folder)
        kinds = [str(module["type"]).rpartition(".")[-1] for module in modules]
        if tuple(kinds) not in (KNOWN_MODULES, KNOWN_MODULES[:2]):
            raise ValueError(
                f"The encoder in {str(folder)!r} consists of {kinds}, but without sentence-transformers only "
                f"{list(KNOWN_MODULES)} can be run, the last one optional. {INSTALL_HINT}"
            )
        _check_pooling(folder, _read_json(folder / modules[1]["path"] / "config.json"))
        transformer = folder / modules[0]["path"]
        settings: dict[str, Any] = next(
            filter(None, (_read_json(transformer / name) for name in TRANSFORMER_CONFIGS)), {}
        )
        library = _read_json(folder / "config_sentence_transformers.json")
        return cls(
            transformer,
            is_bare=False,
            normalizes=len(kinds) == 3,
            max_length=settings.get("max_seq_length"),
            lowers_case=bool(settings.get("do_lower_case", False)),
            prompt=(library.get("prompts") or {}).get(library.get("default_prompt_name")) or "",
        )


def _check_pooling(folder: Path, pooling: dict[str, Any]) -> None:
    """Only the mean over all tokens, in either way of writing it down."""
    modes = pooling.get("pooling_mode")
    if modes is None:
        flags = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
        modes = flags or [MEAN_POOLING_KEY]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes not in (["mean"], [MEAN_POOLING_KEY]):
        raise ValueError(
            f"The encoder in {str(folder)!r} pools by {modes}, but without sentence-transformers only the mean over "
            f"tokens can be computed. {INSTALL_HINT}"
        )
    if pooling.get("include_prompt") is False:
        raise ValueError(
            f"The encoder in {str(folder)!r} leaves its prompt out of pooling, which needs sentence-transformers. "
            f"{INSTALL_HINT}"
        )


def _check_architecture(folder: Path, config: Any, *, is_bare: bool) -> None:
    architectures = config.architectures or []
    if is_bare and any(name.endswith("ForCausalLM") for name in architectures):
        raise ValueError(
            f"{str(folder)!r} holds {architectures[0]}, a causal language model without modules.json, and its mean over "
            "tokens is no sentence embedding. Name a sentence encoder."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{str(folder)!r} holds {config.model_type!r}, an encoder with a decoder, which needs sentence-transformers. "
            f"{INSTALL_HINT}"
        )


def _encoder_folder(name_or_path: str) -> Path:
    """The folder of an encoder; one from the Hub is downloaded, or taken from the cache."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=NEEDED_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        full_name = f" Did you mean 'sentence-transformers/{name_or_path}'?" if "/" not in name_or_path else ""
        raise OSError(
            f"The sentence encoder {name_or_path!r} is no folder here, is not in the cache, and could not be had from "
            f"the Hub ({type(error).__name__}).{full_name} Check the name and the network (is HF_HUB_OFFLINE set?), or "
            "give the folder of a copy."
        ) from error


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
