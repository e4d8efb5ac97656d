"""Tiny models in a cache as that of the Hub, under the names by which the tests ask for them."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.file_download import repo_folder_name
from peft import LoraConfig
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from tiny_architectures import ARCHITECTURES
from tiny_models import tiny_tokenizer
from tiny_moe import FAMILIES


Maker = Callable[[], transformers.PreTrainedModel]


def _tiny(architecture: str, model: str | None = None, **overrides: Any) -> Maker:
    """A model of the table of architectures, or another class of the same family."""

    def make() -> transformers.PreTrainedModel:
        row = next(row for row in ARCHITECTURES if row.name == architecture)
        config = row.config()
        for name, value in overrides.items():
            setattr(config, name, value)
        return getattr(transformers, model or row.model)(config)

    return make


def _tiny_moe(family: str, model: str | None = None, **overrides: Any) -> Maker:
    """A model of the table of mixtures, or another class of the same family."""

    def make() -> transformers.PreTrainedModel:
        row = next(row for row in FAMILIES if row.name == family)
        return replace(row, model=model or row.model).build(**overrides).requires_grad_(True)

    return make


MODELS: dict[str, Maker] = {
    # Llama and GPT-2. By their own names the tests leave out what a method that they do not know may not support
    "tiny/gated": _tiny("llama"),
    "tiny/conv1d": _tiny("gpt2-conv1d"),
    "tiny/opt": _tiny("opt"),
    "tiny/mixtral": _tiny_moe("mixtral"),
    "tiny/mixtral-compiled": _tiny_moe("mixtral"),
    "tiny/mixtral-features": _tiny_moe("mixtral", "MixtralModel"),
    "tiny/mixtral-classifier": _tiny_moe("mixtral", "MixtralForSequenceClassification", num_labels=1),
    "tiny/t5": _tiny("t5"),
    "tiny/bart": _tiny("bart"),
    "tiny/bert": _tiny("bert", "BertModel"),
    "tiny/bert-classifier": _tiny("bert", "BertForSequenceClassification"),
    "tiny/gated-classifier": _tiny("llama", "LlamaForSequenceClassification", num_labels=1),
    "tiny/vit": _tiny("vit", num_labels=3),
    # those whose names stand in the tests themselves
    "peft-internal-testing/opt-125m": _tiny("opt", num_hidden_layers=12),
    "peft-internal-testing/tiny-random-OPTForCausalLM": _tiny("opt"),
    "peft-internal-testing/tiny-random-BertModel": _tiny("bert", "BertModel"),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _tiny("bart"),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _tiny(
        "roberta", "RobertaForSequenceClassification"
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _tiny("llama"),
}
REVISION = "0" * 40
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"
WITH_TOKENIZER = ("peft-internal-testing/tiny-random-OPTForCausalLM",)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="peft-tests-")


@functools.cache
def hub_cache() -> Path:
    """Where the models are; removed at the end of this process."""
    root = Path(_scratch().name)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # wide enough for an adapter to make a difference that counts
                nn.init.normal_(parameter, std=0.2)
        snapshot = root / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / REVISION
        model.save_pretrained(snapshot)
        if name in WITH_TOKENIZER:
            tokenizer = tiny_tokenizer()
            tokenizer.model_max_length = 16
            tokenizer.save_pretrained(snapshot)
        _refer_to(snapshot, "main")
    adapter = root / repo_folder_name(repo_id=ADAPTER, repo_type="model") / "snapshots" / REVISION
    LoraConfig().save_pretrained(adapter)
    _refer_to(adapter, "test")
    return root


def _refer_to(snapshot: Path, branch: str) -> None:
    reference = snapshot.parents[1] / "refs" / branch
    reference.parent.mkdir()
    reference.write_text(REVISION)


class CustomMoe(nn.Module):
    """Numbers through two mixtures of experts, outside of any model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
        )
        config._experts_implementation = "eager"
        self.lin0 = nn.Linear(10, 16)
        self.layers = nn.ModuleList([nn.ModuleDict({"moe": MixtralSparseMoeBlock(config)}) for _ in range(2)])
        self.lin1 = nn.Linear(16, 2)
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """`(T, 10)` → `(T, 2)`, logarithms of probabilities."""
        X = torch.sin(self.lin0(X.to(self.lin0.weight.dtype)))[None]  # noqa: N806
        for layer in self.layers:
            X = X + layer["moe"](X)  # noqa: N806
        return self.lin1(X[0]).log_softmax(-1)


class CustomModels:
    """`from_pretrained` of the models of PEFT's tests of custom models, and of `"Moe"`."""

    def __init__(self, of_peft: Any) -> None:
        self.of_peft = of_peft

    def from_pretrained(self, model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        """A new model, always with the same weights."""
        if model_id != "Moe":
            return self.of_peft.from_pretrained(model_id, dtype=dtype)
        torch.manual_seed(0)
        return CustomMoe().to(dtype or torch.float32)


class TakesClusterIds:
    """`from_pretrained` of a class, whose models take `cluster_ids` before they have an adapter too, and ignore them.

    The tests give the bare model the inputs of the adapted one.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def from_pretrained(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model."""
        model = self.inner.from_pretrained(*args, **kwargs)
        kind = type(model)

        def forward(self: nn.Module, *args: Any, cluster_ids: Any = None, **kwargs: Any) -> Any:
            return kind.forward(self, *args, **kwargs)

        signature = inspect.signature(kind.forward)
        parameters = list(signature.parameters.values())
        ids = inspect.Parameter("cluster_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        is_last = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        parameters.insert(len(parameters) - is_last, ids)
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        return model
