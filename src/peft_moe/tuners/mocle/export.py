"""MoCLE as ordinary LoRA: one adapter for a cluster, or one for each different mixture of experts with a table that
says which cluster needs which, and `ClusterAdapterRouter`, which picks the adapter of a text by that table."""

from __future__ import annotations

import json
import operator
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...foreign_moe import base_of
from ..card import CARD_FILE, is_hub_id
from ..lora_model import adaptable_modules
from ..structure import shorten
from .clustering import FORMAT_VERSION, InstructionClusterer, checksum, damaged, find_file, read_settings
from .clusters import BatchClusters
from .config import MoCLEConfig
from .encoder import SentenceEncoder
from .layer import MoCLELayer


TABLE_FILE = "clusters.json"
TABLE_KEYS = ("adapters", "encoder_name", "template", "instruction_pattern", "centroids", "centroids_sha256")
STAGING_PREFIX = ".export-"
"""what the names of folders that a crash may leave begin with"""
EXPORT_MARK = "mocle_cluster"
"""key in the metadata of the safetensors file by which an export is known again"""
UNIVERSAL = "universal"
KEY_PREFIX = "base_model.model."
HALF_DTYPES = (torch.bfloat16, torch.float16)

Mixture = tuple[tuple[int, float], ...]
"""the experts of a cluster in one linear, each with its weight, in the order of their numbers"""


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
                f"There are {clusterer.num_clusters} clusters, but {len(adapters)} adapters were named. Name one per "
                "cluster."
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
        """The router of an export in a folder or on the Hub, of which only `clusters.json` is read.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): what [`export_all`] wrote: a folder, or an id on the Hub.
            encoder (`str`, `Path` or `SentenceEncoder`, *optional*): where to find the encoder instead, e.g. a local
            copy.
            revision, token, cache_dir, local_files_only: as everywhere on the Hub.

        Raises:
            ValueError: the export holds no centroids, is damaged, or was written in a newer format.
            OSError: there is no such folder, and the Hub does not give the file.
        """
        name = str(pretrained_model_name_or_path)
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        table = read_settings(name, find_file(name, TABLE_FILE, options), TABLE_KEYS)
        encoder = table["encoder_name"] if encoder is None else encoder
        if table["centroids"] is None or encoder is None:
            missing = "centroids" if table["centroids"] is None else "name of an encoder"
            raise ValueError(
                f"The export in {name!r} holds no {missing}, so a text has no cluster: the adapter was not made by "
                f"MoCLEConfig.from_clusterer. Find the cluster as in training, and the adapter as "
                f"json.load(open('{TABLE_FILE}'))['adapters'][cluster]."
            )
        centroids = torch.tensor(table["centroids"], dtype=torch.float32)
        if checksum(centroids) != table["centroids_sha256"] or len(table["adapters"]) != len(centroids):
            raise damaged(
                name, TABLE_FILE, "the centroids are not those that were written, or some adapters are missing"
            )
        clusterer = InstructionClusterer(
            centroids,
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


def export_cluster_lora(
    model: nn.Module, cluster: int | None, path: str | Path, *, adapter_name: str | None = None
) -> Path:
    """Write what a MoCLE adapter does for one cluster as a LoRA adapter, which PEFT loads without this package.

    With the cluster fixed a linear computes `W x + s Σ_k w_k B_k A_k x` with constant weights, which is one LoRA: its
    A is the A_k stacked, its B is the `s w_k B_k` side by side. So its rank is `(top_k + 1) · r` (`top_k · r` without
    universal expert) and its scaling, `lora_alpha / r`, is 1 in every linear. Experts of weight 0 keep their place.

    The products `s w_k B_k` are computed in float64 and rounded once: to float32, or to the dtype of the experts where
    that is bfloat16 or float16. In float32 the outputs then agree with MoCLE up to the order of summation; in half
    precision also up to the rounding of B, a relative error of 2⁻⁹ (bfloat16) or 2⁻¹² (float16) per entry. The gates
    are evaluated as in eval mode, without noise, whatever mode the model is in.

    Args:
        model (`nn.Module`): a `PeftModel`, or a model that was adapted by `add_adapter` or `load_adapter` of
        transformers.
        cluster (`int` or `None`): which cluster; `None`: the universal expert alone, with weight 1.
        path (`str` or `Path`):
            The folder to write, made if it is not there. An earlier export is replaced; other files in its folder
            stay.
        adapter_name (`str`, *optional*): which adapter; by default the active one.

    Returns:
        `Path`: the folder, with `adapter_config.json`, `adapter_model.safetensors` and `README.md`. The configuration
        is written last, so that a folder without it is no whole adapter.

    Raises:
        TypeError: `cluster` is no whole number.
        ValueError: there is no such cluster, no universal expert, no such MoCLE adapter, the weights are not whole in
            this process, or `path` is a file or holds something else than an export.

    Example:

    ```py
    >>> export_cluster_lora(model, 3, "adapter-of-cluster-3")
    >>> from peft import PeftModel  # anywhere, peft_moe is not needed
    >>> PeftModel.from_pretrained(base_model, "adapter-of-cluster-3").merge_and_unload()
    ```
    """
    if isinstance(cluster, bool):
        raise TypeError(f"cluster must be the number of a cluster, but is {cluster!r}.")
    number = None if cluster is None else operator.index(cluster)
    adapter = _Adapter.find(model, adapter_name)
    mixtures = adapter.mixtures(number)
    folder = _usable_folder(path)
    _write_adapter(folder, adapter, mixtures, UNIVERSAL if number is None else str(number))
    return folder


def export_all(model: nn.Module, path: str | Path, *, adapter_name: str | None = None) -> list[Path]:
    """Write an ordinary LoRA adapter for every different mixture of experts, and the table from clusters to adapters.

    Clusters whose experts and weights are equal in all linears share one adapter, `cluster_<the lowest of their ids>`.
    `clusters.json` is what [`ClusterAdapterRouter`] reads; it is written last, and with the centroids if the adapter
    has them. A server needs only the adapters.

    Args:
        model (`nn.Module`), adapter_name (`str`, *optional*): see [`export_cluster_lora`].
        path (`str` or `Path`):
            The folder to write into, made if it is not there. Only an earlier export in it is replaced.

    Returns:
        `list[Path]`: the folders of the adapters, in the order of their clusters.

    Raises:
        ValueError: see [`export_cluster_lora`].

    Example:

    ```py
    >>> [folder.name for folder in export_all(model, "adapters")]
    ['cluster_0', ...]
    ```
    """
    adapter = _Adapter.find(model, adapter_name)
    root = _folder(path)
    mixtures = [adapter.mixtures(cluster) for cluster in range(adapter.config.num_clusters)]
    members: dict[tuple[Mixture, ...], list[int]] = {}
    for cluster, by_layer in enumerate(mixtures):
        members.setdefault(tuple(by_layer.values()), []).append(cluster)
    folders = {group[0]: _usable_folder(root / f"cluster_{group[0]}") for group in members.values()}
    (root / TABLE_FILE).unlink(missing_ok=True)
    for group in members.values():
        _write_adapter(folders[group[0]], adapter, mixtures[group[0]], ",".join(map(str, group)))
    _remove_stale(root, keep=list(folders.values()))
    centroids = adapter.centroids
    table = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_name,
        "max_lora_rank": max(adapter.ranks(mixtures[0]).values()),
        "adapters": [folders[members[tuple(by_layer.values())][0]].name for by_layer in mixtures],
        "encoder_name": adapter.config.encoder_name,
        "template": adapter.config.instruction_template,
        "instruction_pattern": adapter.config.instruction_pattern,
        "centroids_sha256": None if centroids is None else checksum(centroids),
        # the shortest digits that give the same float32 again
        "centroids": None if centroids is None else [[float(str(x)) for x in row] for row in centroids.numpy()],
    }
    with tempfile.TemporaryDirectory(dir=root, prefix=STAGING_PREFIX) as scratch:
        staged = Path(scratch) / TABLE_FILE
        staged.write_text(json.dumps(table) + "\n", encoding="utf-8")
        os.replace(staged, root / TABLE_FILE)
    return list(folders.values())


@dataclass(frozen=True)
class _Adapter:
    """A MoCLE adapter in a model: what has to be known to write it down in another form."""

    name: str
    config: MoCLEConfig
    base: nn.Module
    """the model without the classes of PEFT around it"""
    layers: dict[str, MoCLELayer]

    @classmethod
    def find(cls, model: nn.Module, adapter_name: str | None) -> _Adapter:
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base = base.model if isinstance(base, BaseTuner) else base
        layers = {name: module for name, module in base.named_modules() if isinstance(module, MoCLELayer)}
        present = sorted({name for layer in layers.values() for name in layer.mocle_A})
        if not present:
            raise ValueError(
                f"{type(model).__name__} has no MoCLE adapter, so there is nothing to export. Load one first: import "
                "peft_moe, then PeftModel.from_pretrained(base_model, folder)."
            )
        if adapter_name is None:
            adapter_name = _active_adapter(layers, present)
        elif adapter_name not in present:
            raise ValueError(
                f"There is no MoCLE adapter {adapter_name!r} in this model, but {present}. Name one of these."
            )
        layers = {name: layer for name, layer in layers.items() if adapter_name in layer.mocle_A}
        return cls(adapter_name, base.peft_config[adapter_name], base, layers)

    @torch.no_grad()
    def mixtures(self, cluster: int | None) -> dict[str, Mixture]:
        """The experts of a cluster in each linear."""
        if cluster is None:
            if not self.config.universal_expert:
                raise ValueError(
                    f"cluster=None exports the universal expert, but the adapter {self.name!r} has none "
                    "(universal_expert=False). Name a cluster."
                )
            return dict.fromkeys(self.layers, ((self.config.num_experts, 1.0),))
        if not 0 <= cluster < self.config.num_clusters:
            raise ValueError(
                f"cluster must be between 0 and {self.config.num_clusters - 1} (num_clusters="
                f"{self.config.num_clusters}), but is {cluster}."
            )
        by_scope: dict[str, Mixture] = {}
        for layer in self.layers.values():
            scope = layer.scopes[self.name]
            if scope.name in by_scope:
                continue
            for module in (scope.gate, scope.embedding):
                _check_whole(module.weight, f"gate of '{scope.name}'")
            was_training = scope.gate.training
            scope.gate.eval()  # no noise
            try:
                output = scope.decide(BatchClusters(torch.tensor([cluster])), torch.device("cpu"))
            finally:
                scope.gate.train(was_training)
            assert output.top_k_weights is not None
            pairs = zip(output.top_k_index[0].tolist(), output.top_k_weights[0].tolist(), strict=True)
            by_scope[scope.name] = tuple(sorted(pairs))
        return {name: by_scope[layer.scopes[self.name].name] for name, layer in self.layers.items()}

    def lora_tensors(self, mixtures: dict[str, Mixture]) -> dict[str, torch.Tensor]:
        """A `(K · R, D)` and B `(O, K · R)` of each linear, under the keys of PEFT."""
        tensors = {}
        for name, layer in self.layers.items():
            A, B = layer.mocle_A[self.name].weight.detach(), layer.mocle_B[self.name].weight.detach()
            for weight in (A, B):
                _check_whole(weight, f"experts of '{name}'")
            dtype = A.dtype if A.dtype in HALF_DTYPES else torch.float32
            experts = torch.tensor([expert for expert, _ in mixtures[name]], device=A.device)
            factors = torch.tensor(
                [layer.scaling[self.name] * weight for _, weight in mixtures[name]], dtype=torch.float64
            )
            scaled = B[experts].cpu().double() * factors[:, None, None]
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = A[experts].flatten(0, 1).to("cpu", dtype)
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = scaled.flatten(0, 1).T.to(dtype).contiguous()
        return tensors

    def ranks(self, mixtures: dict[str, Mixture]) -> dict[str, int]:
        """The rank of the export in each linear."""
        return {name: layer.r[self.name] * len(mixtures[name]) for name, layer in self.layers.items()}

    @cached_property
    def other_tensors(self) -> dict[str, torch.Tensor]:
        """What PEFT saves of this adapter besides experts and gates, such as `modules_to_save`."""
        own = tuple(f"{name}.{MoCLELayer.prefix}" for name in self.layers)
        saved = get_peft_model_state_dict(self.base, adapter_name=self.name)
        return {
            f"{KEY_PREFIX}{key}": tensor.detach().cpu().clone()
            for key, tensor in saved.items()
            if not key.startswith(own)
        }

    def lora_config(self, mixtures: dict[str, Mixture]) -> LoraConfig:
        """The configuration of the export."""
        ranks = self.ranks(mixtures)
        # the largest one, for servers that look at r alone to reserve memory
        rank = max(ranks.values())
        pattern = _rank_pattern(ranks, rank)
        names = [name for name, _ in adaptable_modules(self.base)]
        config = LoraConfig(
            task_type=self.config.task_type,
            base_model_name_or_path=self.base_name,
            revision=self.config.revision,
            inference_mode=True,
            r=rank,
            lora_alpha=rank,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            target_modules=shorten(list(self.layers), names),
            modules_to_save=None if self.config.modules_to_save is None else list(self.config.modules_to_save),
            fan_in_fan_out=any(isinstance(base_of(layer), Conv1D) for layer in self.layers.values()),
        )
        if {name for name in names if check_target_module_exists(config, name)} != set(self.layers):
            # the name of one linear is the end of another's, which a list of names would select too
            config.target_modules = "|".join(re.escape(name) for name in sorted(self.layers))
        return config

    @property
    def base_name(self) -> str | None:
        """Id or folder of the base model, as far as it is known."""
        return self.config.base_model_name_or_path or getattr(self.base, "name_or_path", None) or None

    @property
    def auto_mapping(self) -> dict[str, str] | None:
        """What lets PEFT find the class of the base model where no task type says it."""
        if self.config.task_type is not None:
            return None
        return {"base_model_class": type(self.base).__name__, "parent_library": type(self.base).__module__}

    @property
    def centroids(self) -> torch.Tensor | None:
        """Shape `(C, D)`, if the adapter has them."""
        for layer in self.layers.values():
            if self.name in layer.mocle_centroids and layer.mocle_centroids[self.name].are_known:
                return layer.mocle_centroids[self.name].weight.detach().float().cpu()
        return None


def _active_adapter(layers: dict[str, MoCLELayer], present: list[str]) -> str:
    active = {name for layer in layers.values() for name in layer.active_adapters if name in layer.mocle_A}
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} of the MoCLE adapters {present} are active. Say which one to export: "
            f"adapter_name={present[0]!r}."
        )
    return active.pop()


def _check_whole(weight: torch.Tensor, what: str) -> None:
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "full_tensor"):
        raise ValueError(
            f"The weights of the {what} are not in this process (offloaded or sharded). Save the adapter by "
            "save_pretrained, load it in one process without offloading, and export that."
        )


def _rank_pattern(ranks: dict[str, int], default: int) -> dict[str, int]:
    """Ranks that differ from the default, by the last part of names where that tells them."""
    ends: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        ends.setdefault(name.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for name, rank in ranks.items():
        end = name.rpartition(".")[2]
        if rank != default:
            pattern[re.escape(end) if len(ends[end]) == 1 else f"^{re.escape(name)}"] = rank
    return pattern


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"An export is a folder, but {str(folder)!r} is a file. Give another path.")
    return folder


def _usable_folder(path: str | Path) -> Path:
    """The folder, if it is free or holds an earlier export."""
    folder = _folder(path)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in found if not name.startswith(STAGING_PREFIX)]
    if found and not _is_export(folder):
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}, which no export has "
            "written, and is not overwritten. Give another path, or empty the folder."
        )
    return folder


def _is_export(folder: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return EXPORT_MARK in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _write_adapter(folder: Path, adapter: _Adapter, mixtures: dict[str, Mixture], clusters: str) -> None:
    """Write beside the old files and then replace them one by one, the configuration removed first and put in last:
    without it nothing takes the folder for an adapter."""
    from safetensors.torch import save_file

    config = adapter.lora_config(mixtures)
    tensors = {**adapter.other_tensors, **adapter.lora_tensors(mixtures)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=STAGING_PREFIX) as scratch:
        staging = Path(scratch)
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt", EXPORT_MARK: clusters})
        config.save_pretrained(str(staging), auto_mapping_dict=adapter.auto_mapping)
        _card(adapter, config, clusters).save(staging / CARD_FILE)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for name in (SAFETENSORS_WEIGHTS_NAME, CARD_FILE, CONFIG_NAME):
            os.replace(staging / name, folder / name)


def _remove_stale(root: Path, *, keep: list[Path]) -> None:
    """Remove the adapters of an earlier export that the new one does not have; files of others stay."""
    for folder in root.glob("cluster_*"):
        if folder not in keep and folder.is_dir() and _is_export(folder):
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_FILE):
                (folder / name).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _card(adapter: _Adapter, config: LoraConfig, clusters: str) -> ModelCard:
    base = adapter.base_name
    # the Hub refuses a card whose base model is no id
    on_hub = base if base is not None and is_hub_id(base) else None
    tags = ["lora", "mocle", *([f"base_model:adapter:{on_hub}"] if on_hub else [])]
    data = ModelCardData(library_name="peft", base_model=on_hub, tags=tags)
    if clusters == UNIVERSAL:
        title, what = "Universal expert", "the universal expert of a MoCLE adapter, for texts of no known cluster"
    else:
        title = f"{'Clusters' if ',' in clusters else 'Cluster'} {clusters.replace(',', ', ')}"
        what = "what a MoCLE adapter computes for the instructions of the clusters that the title names"
    loading = 'PeftModel.from_pretrained(base_model, "<this folder>")'
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {title} of a MoCLE adapter, as ordinary LoRA

This adapter is {what}, folded into one
LoRA of rank {config.r} with `lora_alpha / r = 1`. No approximation is made; values are rounded once, to the dtype of
the file. Base model: {f"`{base}`" if base else "not recorded"}.

PEFT loads it, and any server that takes LoRA adapters; `peft_moe` is not needed:

```python
from peft import PeftModel

model = {loading}
```

Which instructions belong to which cluster is decided by the nearest centroid of a sentence embedding (MoCLE,
https://huggingface.co/papers/2312.12379).
"""
    )
