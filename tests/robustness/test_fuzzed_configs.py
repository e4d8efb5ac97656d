"""Whatever a field of a configuration holds, it is refused with the name of the field, or the model trains."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from trained import FUZZ

from conformance.tuner_cases import CASES, TunerCase, moextend
from peft_moe import MoCLEConfig, MoExtendConfig, MoLEConfig


CONFIGS = {"mole": MoLEConfig, "mocle": MoCLEConfig, "moextend": MoExtendConfig}
OF_PEFT = {field.name for field in dataclasses.fields(peft.PeftConfig)}
NAMES = ["up_proj", "down_proj", "gate_proj", "q_proj", "lm_head", "mlp", "act_fn", "w9", "all-linear", ""]
PLAUSIBLE = {
    "num_experts": st.integers(1, 9),
    "top_k": st.integers(1, 4),
    "r": st.integers(1, 9),
    "num_clusters": st.integers(2, 9),
    "cluster_embedding_dim": st.integers(1, 9),
    "calibration_dim": st.integers(1, 9),
    "num_new_experts": st.integers(1, 3) | st.dictionaries(st.integers(0, 2), st.integers(1, 3)),
    "lora_alpha": st.integers(1, 32),
    "lora_dropout": st.floats(0, 0.9),
    "temperature": st.floats(0.01, 10),
    "gate_noise_std": st.none() | st.floats(0, 1),
    "guard_offset": st.floats(-10, 0),
    "router_aux_loss_coef": st.floats(0, 1),
    "router_z_loss_coef": st.floats(0, 1),
    "router_jitter_noise": st.floats(0, 0.9),
    "router_init_std": st.none() | st.floats(0, 2),
    "target_modules": st.none() | st.lists(st.sampled_from(NAMES)) | st.sampled_from(NAMES),
    "lora_target_modules": st.none() | st.lists(st.sampled_from(NAMES)) | st.sampled_from(NAMES),
    "exclude_modules": st.none() | st.lists(st.sampled_from(NAMES)) | st.sampled_from(NAMES),
    "modules_to_save": st.none() | st.just(["lm_head"]),
    "rank_pattern": st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5)),
    "alpha_pattern": st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 64)),
    "num_experts_pattern": st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5)),
    "layers": st.none() | st.lists(st.integers(0, 2)),
    "layers_to_transform": st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2)),
    "layers_pattern": st.none() | st.just("layers"),
    "copy_sources": st.none() | st.dictionaries(st.integers(0, 2), st.integers(0, 3)),
    "router_scope": st.sampled_from(["mlp", "module"]),
    "gate_scope": st.sampled_from(["layer", "module"]),
    "gate_scale": st.sampled_from(["none", "straight_through", "prob"]),
    "router_aux_loss_type": st.sampled_from(["switch", "pooled", "mole"]),
    "cluster_embedding_scope": st.sampled_from(["model", "layer", "module"]),
    "cluster_embedding_init": st.sampled_from(["centroids", "normal"]),
    "fallback": st.sampled_from(["error", "universal"]),
    "init": st.sampled_from(["copy", "copy_guarded", "zero_gate", "mean_gate"]),
    "expert_type": st.sampled_from(["ffn", "lora"]),
    "calibration": st.sampled_from([None, "released_code", "paper"]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    "kernel_backend": st.sampled_from(["auto", "eager", "dense", "grouped_mm"]),
    "router_dtype": st.sampled_from(["float32", torch.float32]),
    "gate_dtype": st.sampled_from(["float32", torch.float32]),
    "checkpoint_format": st.just(1),
}
# what comes out of a json file, a typo or a wrong variable
NUMBERS = [True, False, 0, 1, 2, 3, 7, -1, 2.5, 0.0, 0.5, math.nan, math.inf, -math.inf, 1e308, 1e-320, 1 + 2j]
WORDS = ["", "x", "8", "up_proj", "all-linear", "(", ".*", b"x"]
LISTS = [[], ["up_proj"], ["up_proj", 3], [1], [None], [[1.0]], ("up_proj",), {"up_proj"}]
BY_NAME = [{}, {"up_proj": 2}, {"up_proj": -1}, {"up_proj": None}, {"(": 2}, {"0": 1}]
BY_NUMBER = [{1: 2}, {0: 1}, {0: [1]}, {None: 1}]
OBJECTS = [None, object(), torch.float32, torch.tensor(1), lambda: None]
ODD = st.sampled_from([*NUMBERS, *WORDS, *LISTS, *BY_NAME, *BY_NUMBER, *OBJECTS])


def fields_of(method: str) -> list[str]:
    return [field.name for field in dataclasses.fields(CONFIGS[method]) if field.name not in OF_PEFT]


@st.composite
def overrides(draw: st.DrawFn, method: str) -> dict[str, Any]:
    """A few fields with values that make sense or do not."""
    names = draw(st.lists(st.sampled_from(fields_of(method)), min_size=1, max_size=4, unique=True))
    return {name: draw(PLAUSIBLE.get(name, st.booleans()) | ODD) for name in names}


BASES = {
    "mole": next(case for case in CASES if case.tuner == "mole"),
    "mocle": next(case for case in CASES if case.tuner == "mocle"),
    "moextend": TunerCase("moextend", "moextend", moextend(), moextend(), model=CASES[-1].model),
}


def check(method: str, fields: dict[str, Any]) -> None:
    """Raise `AssertionError` if these fields are neither refused by name nor trained with."""
    case = BASES[method]
    try:
        model = case.wrap(**fields)
    except (TypeError, ValueError) as error:
        words = re.findall(r"\w+", str(error).replace("checkpoint format", "checkpoint_format"))
        assert not set(words).isdisjoint(fields), error
        return
    batch = case.batch()
    if "cluster_ids" in batch:
        batch["cluster_ids"] %= model.peft_config["default"].num_clusters
    try:
        model.train()(**batch).loss.backward()
    except ValueError as error:
        # a checksum that no centroids go with shows when they are needed
        assert "centroids_sha256" in fields and "centroids_sha256" in str(error)
        return
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unreached, unreached


@pytest.mark.slow
@pytest.mark.parametrize("max_examples", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("method", CONFIGS)
def test_any_fields_are_refused_by_name_or_train(method, max_examples):
    @settings(max_examples=max_examples, **FUZZ)
    @given(overrides(method))
    def run(fields: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(method, fields)

    transformers.logging.set_verbosity_error()
    run()
