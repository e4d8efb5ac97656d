"""`MoCLEModel`: puts cluster gates and LoRA experts into the linears of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...foreign_moe import base_of
from ..lora_model import LoraExpertsModel
from ..structure import ATTENTION_BLOCKS, MLP_BLOCKS, find_blocks, text_linear_names
from .clustering import checksum
from .clusters import ClusterFinder, ClusterLookup
from .config import MoCLEConfig
from .entrance import close_entrance, open_entrance
from .layer import GateScope, MoCLELayer, lookups_of


# their language model gets its adapters in the attention (paper, section 4)
QUERY_VALUE_MODEL_TYPES = ("instructblip", "instructblipvideo", "blip-2", "blip_2")
QUERY_VALUE_NAMES = ("q_proj", "v_proj", "q", "v", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
# what decides, besides the centroids, which cluster a prompt belongs to
READING_FIELDS = ("encoder_name", "instruction_template", "instruction_pattern")


@dataclass
class _Injection:
    """What the layers of an adapter share while it is injected, one after the other."""

    lookup: ClusterLookup
    first: MoCLELayer
    """holds the centroids"""
    scopes: dict[str, GateScope] = field(default_factory=dict)
    embedding_owners: dict[str, MoCLELayer] = field(default_factory=dict)
    """what holds the table of embeddings of the model (`""`), of a layer, or of a linear"""


class MoCLEModel(LoraExpertsModel):
    """Creates a mixture of cluster-conditional LoRA experts from a pretrained model (MoCLE,
    https://huggingface.co/papers/2312.12379).

    The adapted model takes `cluster_ids` `(B,)`, the cluster of each example, in `forward` and `generate`.

    Args:
        model (`torch.nn.Module`): the model to be adapted.
        config (`MoCLEConfig`): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    **Attributes**:
        - **model** (`torch.nn.Module`) -- the adapted model.
        - **peft_config** (`dict[str, MoCLEConfig]`) -- the configuration of each adapter.
    """

    prefix = "mocle_"
    tuner_layer_cls = MoCLELayer
    tags = ("peft_moe", "mocle")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does; the base model then takes `cluster_ids`."""
        config = self.peft_config[adapter_name]
        if config.centroids is None:
            config.centroids = self._centroids_of_a_sibling(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        open_entrance(model, self.recorder)

    def _siblings(self, config: MoCLEConfig) -> list[ClusterLookup]:
        """Those of the adapters with the same centroids. trl makes a reference adapter from the configuration alone:
        it has the checksum of the centroids, but neither the centroids nor what finds the clusters of prompts."""
        if config.centroids_sha256 is None:
            return []
        return [found for found in lookups_of(self.model) if found.config.centroids_sha256 == config.centroids_sha256]

    def _centroids_of_a_sibling(self, config: MoCLEConfig) -> torch.Tensor | None:
        for sibling in self._siblings(config):
            centroids = sibling.centroids
            if centroids is not None and not centroids.weight.is_meta and centroids.are_known:
                return centroids.weight.detach().cpu().clone()
        return None

    def _finder_of_a_sibling(self, config: MoCLEConfig) -> ClusterFinder | None:
        """What [`attach_encoder`] gave to an adapter that reads the same text and sends it to the same clusters."""
        for sibling in self._siblings(config):
            reads_alike = all(getattr(sibling.config, name) == getattr(config, name) for name in READING_FIELDS)
            if reads_alike and sibling.finder is not None:
                return sibling.finder
        return None

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        close_entrance(model, self.recorder)
        return model

    def _prepare_adapter_config(self, peft_config: MoCLEConfig, model_config: dict[str, Any]) -> MoCLEConfig:
        if peft_config.target_modules is not None:
            return peft_config
        linear_names = text_linear_names(self.model)
        if model_config.get("model_type") in QUERY_VALUE_MODEL_TYPES:
            blocks = find_blocks(linear_names, ATTENTION_BLOCKS)
            names = [n for block in blocks.values() for n in block if n.rpartition(".")[2] in QUERY_VALUE_NAMES]
            wanted = "query and value projections"
        else:
            # those that read the block's input come first: of three, the first one is the gate
            names = [n for block in find_blocks(linear_names, MLP_BLOCKS).values() for n in block[-2:]]
            wanted = "MLP"
        if not names:
            raise ValueError(
                f"MoCLE found no {wanted} in {type(self.model).__name__}. It looks for linears with usual names such "
                "as gate_proj/up_proj/down_proj, fc1/fc2 or q_proj/v_proj; name yours in target_modules."
            )
        peft_config.target_modules = self._select(names, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: MoCLEConfig, model: nn.Module) -> None:
        """Check every target before the first one is touched."""
        self._injection: _Injection | None = None
        if peft_config.target_modules == "all-linear":
            return
        of_text = set(text_linear_names(model))
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name in self._targets(peft_config, model):
            if name not in of_text and base_of(model.get_submodule(name)) is not head:
                raise ValueError(
                    f"'{name}' does not belong to the language model of {type(model).__name__}: its batch is one of "
                    "images, which cluster_ids say nothing about. Remove it from target_modules; to train it in full, "
                    "name it in modules_to_save."
                )

    def _new_layer(self, target: nn.Module, name: str) -> MoCLELayer:
        return MoCLELayer(target, name, self.recorder)

    def _update_layer(self, layer: MoCLELayer, adapter_name: str, peft_config: MoCLEConfig, **settings: Any) -> None:
        if self._injection is None:
            lookup = ClusterLookup(adapter_name, peft_config, finder=self._finder_of_a_sibling(peft_config))
            self._injection = _Injection(lookup, first=layer)
        shared = self._injection
        layer_name = _layer_of(self.model, layer.name)
        name = layer.name if peft_config.gate_scope == "module" else layer_name
        scope = shared.scopes.setdefault(name, GateScope(name, shared.lookup))
        scope.members.append(layer.name)
        tables = {"model": "", "layer": layer_name, "module": name}
        table = tables[peft_config.cluster_embedding_scope]
        scope.embedding_owner = shared.embedding_owners.setdefault(table, layer)
        layer.update_layer(
            adapter_name,
            peft_config,
            scope=scope,
            owns_embedding=scope.embedding_owner is layer,
            owns_centroids=layer is shared.first and peft_config.centroids_sha256 is not None,
            **settings,
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = getattr(config, "centroids_sha256", None)
        for name, tensor in remapped.items():
            if ".mocle_centroids." in name and expected is not None and checksum(tensor) != expected:
                raise ValueError(
                    f"The centroids in the file of the adapter {adapter_name!r} are not those that its "
                    "adapter_config.json names (centroids_sha256): prompts would be sent to the wrong experts. "
                    "Nothing was loaded. One of the two files was changed or comes from elsewhere; fetch both again."
                )
        return remapped


def _layer_of(model: nn.Module, name: str) -> str:
    """The layer of a model that the linear `name` belongs to: what gradient checkpointing recomputes as one, else the
    outermost entry of a module list, else the linear itself."""
    parts = name.split(".")
    module, entry, checkpointed = model, None, None
    for depth, part in enumerate(parts[:-1], start=1):
        parent, module = module, module.get_submodule(part)
        if entry is None and isinstance(parent, nn.ModuleList):
            entry = depth
        if isinstance(module, GradientCheckpointingLayer):
            checkpointed = depth
    depth = checkpointed or entry or len(parts)
    return ".".join(parts[:depth])
