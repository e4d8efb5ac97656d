"""`MoLEModel`: puts routers and LoRA experts into the MLPs of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...foreign_moe import base_of
from ..lora_model import LoraExpertsModel, adaptable_modules, by_pattern, is_target
from ..structure import ATTENTION_BLOCKS, MLP_BLOCKS, check_target, find_blocks, is_linear, text_linear_names
from .config import ATTENTION, MoLEConfig
from .layer import MoLELayer, RouterScope


class MoLEModel(LoraExpertsModel):
    """Creates a mixture of LoRA experts from a pretrained model.

    After LLaVA-MoLE (https://huggingface.co/papers/2401.16160).

    Args:
        model (`torch.nn.Module`): the model to be adapted.
        config (`MoLEConfig`): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    **Attributes**:
        - **model** (`torch.nn.Module`) -- the adapted model.
        - **peft_config** (`dict[str, MoLEConfig]`) -- the configuration of each adapter.
        - **recorder** (`RoutingRecorder`) -- what its routers decided in the last forward pass.
    """

    prefix = "mole_"
    tuner_layer_cls = MoLELayer
    tags = ("peft_moe", "mole")

    def _prepare_adapter_config(self, peft_config: MoLEConfig, model_config: dict[str, Any]) -> MoLEConfig:
        linear_names = text_linear_names(self.model)
        if peft_config.target_modules is None:
            blocks = find_blocks(linear_names, MLP_BLOCKS)
            peft_config.target_modules = self._select(
                [name for block in blocks.values() for name in block], peft_config
            )
            if not peft_config.target_modules:
                raise ValueError(
                    f"MoLE found no MLP in {type(self.model).__name__}. It looks for linears with usual names such as "
                    "gate_proj/up_proj/down_proj, fc1/fc2 or intermediate.dense/output.dense; name yours in "
                    "target_modules. (Experts of a mixture of experts are single parameters, not linears, and have no "
                    "place for MoLE.)"
                )
        if peft_config.lora_target_modules == ATTENTION:
            peft_config.lora_target_modules = self._find_attention(peft_config, linear_names)
        return peft_config

    def _find_attention(self, peft_config: MoLEConfig, linear_names: list[str]) -> set[str] | None:
        """Linears of the attention blocks, without those that get experts; `None` where nothing is left."""
        if peft_config.target_modules == "all-linear":
            return None
        blocks = find_blocks(linear_names, ATTENTION_BLOCKS)
        names = [name for block in blocks.values() for name in block if not is_target(peft_config, name)]
        return self._select(names, peft_config, may_be_empty=True) or None

    def _prepare_model(self, peft_config: MoLEConfig, model: nn.Module) -> None:
        """Check every target before the first one is touched, and find out which linears form an MLP."""
        linear_names = [name for name, module in model.named_modules() if is_linear(base_of(module))]
        blocks = find_blocks(linear_names, MLP_BLOCKS)
        self._block_of = {member: block for block, members in blocks.items() for member in members}
        self._scopes: dict[str, RouterScope] = {}
        if peft_config.target_modules == "all-linear":
            return
        for name, module in adaptable_modules(model):
            if _is_lora(peft_config, name):
                if is_target(peft_config, name):
                    raise ValueError(
                        f"'{name}' is in target_modules and in lora_target_modules. A linear gets experts or an "
                        "ordinary LoRA: remove it from one of the two."
                    )
                check_target(model, name, base_of(module), method=peft_config.method)
        num_experts_of: dict[str, tuple[str, int]] = {}
        for name in self._targets(peft_config, model):
            block, num_experts = self._block_and_experts(peft_config, name)
            first, expected = num_experts_of.setdefault(block, (name, num_experts))
            if num_experts != expected:
                raise ValueError(
                    f"num_experts_pattern gives '{name}' {num_experts} experts, but '{first}' {expected}, and both "
                    f"follow the router of '{block}'. Use the name of the MLP as the key."
                )

    @staticmethod
    def _check_target_module_exists(peft_config: MoLEConfig, key: str) -> Any:
        return is_target(peft_config, key) or _is_lora(peft_config, key)

    def _new_layer(self, target: nn.Module, name: str) -> MoLELayer:
        return MoLELayer(target, name, self.recorder, self.aux_loss)

    def _update_layer(self, layer: MoLELayer, adapter_name: str, peft_config: MoLEConfig, **settings: Any) -> None:
        scope = self._scope_of(peft_config, adapter_name, layer.name)
        layer.update_layer(adapter_name, peft_config, scope=scope, **settings)

    def _scope_of(self, peft_config: MoLEConfig, adapter_name: str, name: str) -> RouterScope | None:
        """The scope that a linear joins; `None` for an ordinary LoRA."""
        if not is_target(peft_config, name):
            return None
        block, num_experts = self._block_and_experts(peft_config, name)
        if num_experts == 1:
            return None
        scope = self._scopes.setdefault(block, RouterScope(block, adapter_name))
        scope.num_experts = num_experts
        scope.members.append(name)
        return scope

    def _block_and_experts(self, peft_config: MoLEConfig, name: str) -> tuple[str, int]:
        """Whose router a linear follows, and how many experts that has."""
        block = name
        if peft_config.router_scope == "mlp":
            block = self._block_of.get(name, name.rpartition(".")[0] or name)
        by_block = by_pattern(peft_config.num_experts_pattern, block, peft_config.num_experts)
        return block, by_pattern(peft_config.num_experts_pattern, name, by_block)


def _is_lora(config: MoLEConfig, name: str) -> Any:
    lora_targets = config.lora_target_modules
    return is_target(config, name, target_modules=lora_targets) if lora_targets else False
