"""How a clusterer is kept: centroids as safetensors, everything else as json, with a checksum that ties them together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE = "clusterer.safetensors", "clusterer_config.json"


def write_clusterer(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files into `folder`, which is there already."""
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    checked = {"format_version": FORMAT_VERSION, **settings, "centroids_sha256": checksum(tensors["centroids"])}
    (folder / CONFIG_FILE).write_text(json.dumps(checked, indent=2) + "\n", encoding="utf-8")


def read_clusterer(name: str, hub_options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and tensors of a saved clusterer, checked against each other.

    Args:
        name (`str`): a folder, or an id on the Hub.
        hub_options (`dict[str, Any]`): for `hf_hub_download`.

    Raises:
        ValueError: files are missing, damaged or do not belong together, or were written in a newer format.
        OSError: there is no such folder and nothing to be had from the Hub.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(name).expanduser()
    if folder.is_dir():
        config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    else:
        config_file, weights_file = (download(name, file, hub_options) for file in (CONFIG_FILE, WEIGHTS_FILE))
    if missing := [file.name for file in (config_file, weights_file) if not file.is_file()]:
        raise ValueError(
            f"{name!r} holds no whole clusterer: {' and '.join(missing)} missing. Give the folder that save_pretrained wrote."
        )
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        found_format = settings["format_version"]
        if found_format > FORMAT_VERSION:
            raise ValueError(
                f"The clusterer in {name!r} has format {found_format}, but this version of peft_moe reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install -U peft_moe."
            )
        # copies: the file may be written again while its tensors are in use
        tensors = {key: tensor.clone() for key, tensor in load_file(weights_file).items()}
        centroids, sizes = tensors["centroids"], tensors["cluster_sizes"]
        shape = (settings["num_clusters"], settings["embedding_dim"])
        expected_sha256 = settings["centroids_sha256"]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error
    needed = ("encoder_name", "template", "instruction_pattern", "seed", "num_texts")
    if absent := [key for key in needed if key not in settings]:
        raise _damaged(name, f"{config_file.name} lacks {absent}")
    if tuple(centroids.shape) != shape or tuple(sizes.shape) != shape[:1]:
        raise _damaged(
            name,
            f"{config_file.name} speaks of {shape[0]} clusters of width {shape[1]}, but {weights_file.name} holds centroids "
            f"{tuple(centroids.shape)} and sizes {tuple(sizes.shape)}",
        )
    if centroids.dtype != torch.float32 or not torch.isfinite(centroids).all():
        raise _damaged(name, f"the centroids are {centroids.dtype} or not finite")
    if checksum(centroids) != expected_sha256:
        raise _damaged(name, "the centroids are not those that were saved (other checksum)")
    return settings, tensors


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(
        f"The clusterer in {name!r} is damaged or put together from two: {what}. Nothing was loaded. Fetch or save both "
        f"files again: {CONFIG_FILE} and {WEIGHTS_FILE}."
    )


def download(name: str, file: str, options: dict[str, Any]) -> Path:
    """A file of the Hub repository `name`; raises `OSError` that says what to check."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, **options))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise OSError(
            f"{name!r} is no folder here, and {file} of it could not be had from the Hub ({type(error).__name__}). Check "
            "the name and the network (is HF_HUB_OFFLINE set?)."
        ) from error


def checksum(centroids: torch.Tensor) -> str:
    """SHA-256 of centroids `(K, C)`, as little-endian float32."""
    return hashlib.sha256(centroids.detach().float().cpu().numpy().astype("<f4").tobytes()).hexdigest()
