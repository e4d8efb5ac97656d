"""`clusters.json`, the table of an export, and `ClusterAdapterRouter`, which picks the adapter of a text by it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .cluster_file import checksum, download
from .clustering import InstructionClusterer
from .config import MoCLEConfig
from .encoder import SentenceEncoder


FORMAT_VERSION = 1
TABLE_FILE = "clusters.json"
STAGING_PREFIX = ".export-"
"""what the names of folders that a crash may leave begin with"""


class ClusterAdapterRouter:
    """Says which exported adapter a text needs: the client's half of serving MoCLE by a server with several LoRAs.

    Args:
        clusterer (`InstructionClusterer`): finds the cluster.
        adapters (`Sequence[str]`): the name of the adapter of each cluster.

    Raises:
        ValueError: there are not as many adapters as clusters.

    Example:

    ```py
    >>> router = ClusterAdapterRouter.from_pretrained("adapters")
    >>> router.adapter_for("What colour is the car?")
    'cluster_4'
    >>> router.adapter_for([{"role": "user", "content": "What colour is the car?"}])
    'cluster_4'
    ```
    """

    def __init__(self, clusterer: InstructionClusterer, adapters: Sequence[str]) -> None:
        if len(adapters) != clusterer.num_clusters:
            raise ValueError(
                f"There are {clusterer.num_clusters} clusters, but {len(adapters)} adapters were named. Name one per cluster."
            )
        self.clusterer = clusterer
        self.adapters = tuple(adapters)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        encoder: str | Path | SentenceEncoder | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> ClusterAdapterRouter:
        """The router of an export in a folder or on the Hub; only `clusters.json` is read, and the encoder when needed.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): what [`export_all`] wrote: a folder, or an id on the Hub.
            encoder (`str`, `Path` or `SentenceEncoder`, *optional*): where to find the encoder instead, e.g. a local copy.
            revision, token, cache_dir, local_files_only: as everywhere on the Hub.

        Raises:
            ValueError: the export holds no centroids, is damaged, or was written in a newer format.
            OSError: there is no such folder and nothing to be had from the Hub.
        """
        name = str(pretrained_model_name_or_path)
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        table = read_table(name, _table_file(name, options))
        encoder = table["encoder_name"] if encoder is None else encoder
        if table["centroids"] is None or encoder is None:
            missing = "centroids" if table["centroids"] is None else "name of an encoder"
            raise ValueError(
                f"The export in {name!r} holds no {missing}, so a text has no cluster: the adapter was not made by "
                f"MoCLEConfig.from_clusterer. Find the cluster as in training, and the adapter as "
                f"json.load(open('{TABLE_FILE}'))['adapters'][cluster]."
            )
        clusterer = InstructionClusterer(
            torch.tensor(table["centroids"], dtype=torch.float32),
            encoder=encoder,
            template=table["template"],
            instruction_pattern=table["instruction_pattern"],
        )
        return cls(clusterer, table["adapters"])

    def adapter_for(self, text: str | Sequence[Mapping[str, Any]]) -> str:
        """The name of the adapter for a text or a chat."""
        return self.adapters_for([text])[0]

    def adapters_for(self, texts: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[str]:
        """The names of the adapters for N texts or chats, which are encoded together.

        Raises:
            ValueError: no texts, one without an instruction, or an encoder of another width than the centroids.
        """
        return [self.adapters[cluster] for cluster in self.clusterer.predict(texts).tolist()]

    def __repr__(self) -> str:
        return f"ClusterAdapterRouter({self.clusterer!r}, {len(set(self.adapters))} adapters)"


def write_table(
    root: Path,
    adapters: list[str],
    config: MoCLEConfig,
    *,
    base_name: str | None,
    max_rank: int,
    centroids: torch.Tensor | None,
) -> None:
    """Write `clusters.json` in one step.

    Args:
        root (`Path`): the folder.
        adapters (`list[str]`): the name of the adapter of each cluster.
        config (`MoCLEConfig`): of the adapter that was exported.
        base_name (`str`, *optional*): id or folder of the base model.
        max_rank (`int`): the largest rank, which a server has to be told.
        centroids (`torch.Tensor`, *optional*): shape `(C, D)`.
    """
    table = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_name,
        "max_lora_rank": max_rank,
        "adapters": adapters,
        "encoder_name": config.encoder_name,
        "template": config.instruction_template,
        "instruction_pattern": config.instruction_pattern,
        "centroids_sha256": None if centroids is None else checksum(centroids),
        # the shortest digits that give the same float32 again
        "centroids": None if centroids is None else [[float(str(x)) for x in row] for row in centroids.numpy()],
    }
    with tempfile.TemporaryDirectory(dir=root, prefix=STAGING_PREFIX) as scratch:
        staged = Path(scratch) / TABLE_FILE
        staged.write_text(json.dumps(table) + "\n", encoding="utf-8")
        os.replace(staged, root / TABLE_FILE)


def _table_file(name: str, options: dict[str, Any]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / TABLE_FILE).is_file():
            raise ValueError(f"{name!r} holds no {TABLE_FILE}. Give the folder that export_all wrote, whole.")
        return folder / TABLE_FILE
    return download(name, TABLE_FILE, options)


def read_table(name: str, file: Path) -> dict[str, Any]:
    """The content of `clusters.json`, checked.

    Raises:
        ValueError: it is damaged, or was written in a newer format.
    """
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found_format = table["format_version"]
        if found_format > FORMAT_VERSION:
            raise _NewerFormat(
                f"The export in {name!r} has format {found_format}, but this version of peft_moe reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install -U peft_moe."
            )
        for key in ("adapters", "encoder_name", "template", "instruction_pattern", "centroids", "centroids_sha256"):
            table[key]
        centroids = table["centroids"]
        if centroids is not None:
            found = checksum(torch.tensor(centroids, dtype=torch.float32))
            if found != table["centroids_sha256"]:
                raise ValueError("the centroids are not those that were written (other checksum)")
            if len(table["adapters"]) != len(centroids):
                raise ValueError(f"{len(table['adapters'])} adapters for {len(centroids)} clusters")
    except _NewerFormat:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{TABLE_FILE} in {name!r} is damaged ({type(error).__name__}: {error}). Fetch it again, or export again."
        ) from error
    return table


class _NewerFormat(ValueError):
    """A file of a later version."""
