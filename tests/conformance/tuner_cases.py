"""The table of tuners that the conformance tests run over. A new tuner joins with one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_moe import InstructionClusterer, MoCLEConfig, MoExtendConfig, MoLEConfig
from peft_moe.tuners.mocle.config import RELEASED_CODE
from tiny_models import tiny_llama, token_batch
from tiny_moe import FAMILIES


@dataclass(frozen=True)
class TunerCase:
    """One row.

    Args:
        name (`str`): how the tests are called.
        tuner (`str`): the name that the tuner is registered by.
        config (`Callable`): makes the configuration of a causal language model; takes overrides. Adapters have to
            change the output from the start, and must not draw random numbers.
        other_config (`Callable`): another one for the same model, with other shapes.
        model (`Callable`): makes the base model.
        batch (`Callable`): makes its input, with labels.
        float32_parts (`tuple[str, ...]`): parameters that stay float32 in any model, by a part of their name.
        adapts_linears (`bool`): whether linears are adapted, and not whole blocks.
        router_inputs (`tuple[str, ...]`): what of the batch is for the routers only, and `generate` needs as well.
    """

    name: str
    tuner: str
    config: Callable[..., PeftConfig]
    other_config: Callable[..., PeftConfig]
    model: Callable[..., nn.Module] = tiny_llama
    batch: Callable[..., dict[str, Any]] = token_batch
    float32_parts: tuple[str, ...] = ("_router.",)
    adapts_linears: bool = True
    router_inputs: tuple[str, ...] = ()

    def for_routers(self) -> dict[str, Any]:
        """What the routers need with the batch."""
        return {name: value for name, value in self.batch().items() if name in self.router_inputs}

    def wrap(self, **overrides: Any) -> PeftModel:
        """The adapted model, always with the same weights, in evaluation mode."""
        model = self.model()
        torch.manual_seed(7)
        return get_peft_model(model, self.config(**overrides)).eval()

    def logits(self, model: nn.Module) -> torch.Tensor:
        """What `model` says about the batch."""
        with torch.no_grad():
            return model(**self.batch()).logits

    def base_logits(self) -> torch.Tensor:
        """What the bare model says about the batch."""
        return self.logits(self.model().eval())


def mole(**settings: Any) -> Callable[..., MoLEConfig]:
    """A maker of configurations."""
    defaults = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return lambda **overrides: MoLEConfig(**{**defaults, **settings, **overrides})


def mocle(**settings: Any) -> Callable[..., MoCLEConfig]:
    """A maker of configurations."""
    defaults = {
        "num_clusters": 6,
        "cluster_embedding_dim": 5,
        "gate_noise_std": 0.0,
        "r": 2,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return lambda **overrides: MoCLEConfig(**{**defaults, **settings, **overrides})


def mocle_of_a_clusterer(**overrides: Any) -> MoCLEConfig:
    """A configuration that carries centroids, which the adapter then saves."""
    centroids = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    fields = {"num_experts": 3, "gate_noise_std": 0.0, "r": 2, "lora_dropout": 0.0, "init_lora_weights": False}
    clusterer = InstructionClusterer(centroids, encoder="an/encoder")
    return MoCLEConfig.from_clusterer(clusterer, **{**fields, "task_type": "CAUSAL_LM", **overrides})


def clustered_batch(batch_size: int = 2, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tokens, and the cluster of each example."""
    return {**token_batch(batch_size, *args, **kwargs), "cluster_ids": torch.arange(batch_size) % 6}


def moextend(**settings: Any) -> Callable[..., MoExtendConfig]:
    """A maker of configurations."""
    defaults = {"init": "zero_gate", "task_type": "CAUSAL_LM"}
    return lambda **overrides: MoExtendConfig(**{**defaults, **settings, **overrides})


def tiny_mixtral(**overrides: Any) -> nn.Module:
    """A mixture of experts whose routers are far from ties."""
    return FAMILIES[0].build(**overrides)


CLUSTERED = {
    "batch": clustered_batch,
    "float32_parts": ("_gate.", "_embedding."),
    "router_inputs": ("cluster_ids",),
}
OTHER_MOCLE = mocle(num_experts=5, r=3, top_k=2, gate_bias=True)
OTHER_MOLE = mole(num_experts=5, r=3, top_k=3, router_bias=False)

CASES = [
    TunerCase("mole-top-1", "mole", mole(num_experts=3), OTHER_MOLE),
    TunerCase("mole-top-2-weighted", "mole", mole(num_experts=4, top_k=2, gate_scale="prob"), OTHER_MOLE),
    TunerCase("mole-soft-per-module", "mole", mole(num_experts=2, soft=True, router_scope="module"), OTHER_MOLE),
    TunerCase("mocle", "mocle", mocle(num_experts=3), OTHER_MOCLE, **CLUSTERED),
    TunerCase("mocle-with-centroids", "mocle", mocle_of_a_clusterer, OTHER_MOCLE, **CLUSTERED),
    TunerCase(
        "mocle-released-code",
        "mocle",
        mocle(**{**RELEASED_CODE, "gate_noise_std": 0.0}),
        OTHER_MOCLE,
        **CLUSTERED,
    ),
]
CASES += [
    TunerCase(
        "moextend",
        "moextend",
        moextend(),
        moextend(num_new_experts={0: 2, 2: 1}),
        model=tiny_mixtral,
        float32_parts=("_calibration.",),
        adapts_linears=False,
    ),
    TunerCase(
        "moextend-low-rank",
        "moextend",
        moextend(expert_type="lora", r=2),
        moextend(num_new_experts=2, init="mean_gate"),
        model=tiny_mixtral,
        float32_parts=("_calibration.",),
        adapts_linears=False,
    ),
]

every_tuner = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ONE_PER_TUNER = list({case.tuner: case for case in reversed(CASES)}.values())
one_case_per_tuner = pytest.mark.parametrize("case", ONE_PER_TUNER, ids=lambda case: case.tuner)
