"""Where PEFT's tests do not simply pass with our configurations, and why. What is not listed here has to hold."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version

import pytest


# the minor version of PEFT that the lists were made for; of others only failures count
LISTED_FOR = "0.21"
IS_LISTED_VERSION = version("peft").startswith(f"{LISTED_FOR}.")


@dataclass(frozen=True)
class Listed:
    """A set of tests and configurations. A field holds patterns with spaces between; one of each has to match.

    Args:
        reason (`str`): why.
        tests (`str`), cases (`str`): the tests and the configurations.
        suites (`str`): the suites.
        ids (`str`): the parameters of the test, as pytest shows them.
        raises (`type`, `tuple` or `RaisesExc`): what a failure raises; anything else is a failure that counts.
    """

    reason: str
    tests: str
    cases: str
    suites: str = "*"
    ids: str = "*"
    raises: type[BaseException] | tuple[type[BaseException], ...] | pytest.RaisesExc = AssertionError

    def covers(self, suite: str, test: str, case: str, identifier: str) -> bool:
        """Whether a test is in the set."""
        pairs = ((self.suites, suite), (self.tests, test), (self.cases, case), (self.ids, identifier))
        return all(any(fnmatchcase(value, one) for one in patterns.split()) for patterns, value in pairs)


# how many tests of each suite run, with any number of configurations: what is left out without a word would be missed
# here
NUM_TESTS = {
    "decoder": 32,
    "encoder_decoder": 27,
    "feature_extraction": 16,
    "seq_classifier": 11,
    "vision": 1,
    "custom": 75,
    "config": 21,
    "mapping": 3,
    "low_level_api": 18,
    "tuners_utils": 70,
    "initialization": 22,
    "torch_compile": 2,
}

# tests that would be taken, but do not apply: reason → patterns of `suite.Class.test`
NOT_RUN = {
    "It is about prompt learning.": "*.test_prompt_tuning_* *.test_training_prompt_learning_tasks "
    "feature_extraction.*.test_passing_input_embeds_works",
    "It needs a model of the Hub.": "config.*.test_from_pretrained_cache_dir",
    "It is about biases, which ours do not train.": "low_level_api.*_bias_in_module_name",
    "It looks at the parameters or the names of LoRA's layers.": "tuners_utils.*.test_adapter_model_type_small "
    "tuners_utils.*.test_model_status_with_modules_to_save tuners_utils.*.test_module_type_small "
    "tuners_utils.*.test_nb_params_small tuners_utils.*.test_peft_types_small "
    "tuners_utils.*.test_prefixes_tuner_layer_inside_auxiliary_module_not_included",
}

ROUTED = "mole-top-? mole-soft-per-linear mocle*"
_ONE_WEIGHT = "Experts that are chosen by token or by example cannot be merged into one weight; they say so."
_LARGER = "New experts need larger tensors: they cannot be merged in place, only by merge_and_unload."
_FLOAT32 = "Routers, gates and calibrations are float32 in any model, as in mixtures that are pretrained."

FAILS = [
    Listed(
        _ONE_WEIGHT,
        "test_merge_* test_safe_merge test_delete_merged_adapter_* test_disable_adapters_with_merging "
        "test_forward_float16* test_forward_bfloat16* test_sequential_merge_* test_unmerge_* "
        "test_multiple_active_adapters_merge_* test_merge_adapters_small test_model_merged_adapters_small",
        ROUTED,
        raises=pytest.RaisesExc(ValueError, match="cannot be merged into one weight"),
    ),
    Listed(
        _LARGER,
        "test_merge_layers test_merge_layers_is_* test_delete_merged_adapter_* test_disable_adapters_with_merging "
        "test_forward_float16* test_forward_bfloat16*",
        "moextend*",
        raises=pytest.RaisesExc(ValueError, match="cannot be merged in place"),
    ),
    Listed(
        "New experts are copies, so that two new adapters of one configuration do the same.",
        "test_merge_layers_multi",
        "moextend*",
    ),
    Listed(
        _FLOAT32,
        "test_add_adapter_no_autocast_adapter_dtype",
        f"{ROUTED} moextend-calibrated",
        # T5 in float16 is part float32 itself
        ids="dtype1-* dtype0-tiny/[!t]* dtype0-tiny/t[!5]*",
    ),
    Listed(_FLOAT32, "test_adapter_dtype_autocast", f"{ROUTED} moextend-calibrated", ids="*-False-dtype[01]-*"),
    Listed(
        "MoExtend fills in fields of its configuration, and does so in a copy: the same one can be used again, for "
        "another base model.",
        "test_from_pretrained_config_construction",
        "moextend*",
    ),
    Listed(
        "MoExtend adapts routers and experts, which have more than one number of features.",
        "test_in_features_out_features_exposed",
        "moextend*",
    ),
    Listed(
        "No init of MoExtend both is the base model and learns in a few steps.", "test_disable_adapters", "moextend*"
    ),
    Listed(
        "MoExtend names its layers in `layers`.",
        "test_config_layers_to_transform_index_zero",
        "moextend*",
        raises=TypeError,
    ),
    Listed(
        "PeftMixedModel takes a fixed list of PEFT's own methods.",
        "test_no_infinite_recursion test_add_adapter_rejects_duplicate_name_without_mutation",
        "m*",
        ids="PeftMixedModel-* True-*",
        raises=pytest.RaisesExc(ValueError, match="not compatible with the `PeftMixedModel`"),
    ),
    Listed(
        "Targets that are not named are found by structure, and not by a table of models; errors are worded for that.",
        "test_default_target_modules_* test_all_modules_excluded test_some_modules_excluded_some_unmatched "
        "test_second_adapter_only_modules_to_save_raises",
        "m*",
        raises=(AssertionError, ValueError),
    ),
    Listed(
        "The tiny model is narrower than the rank that the test takes, 20.",
        "test_weighted_combination_of_adapters",
        "lora",
        ids="tiny/conv1d:*",
        raises=RuntimeError,
    ),
    Listed(
        "PEFT finds layers by number only below a module with a name, and this model has no head around them.",
        "test_training_layer_indexing",
        "lora",
        suites="feature_extraction",
        ids="tiny/mixtral-features:*",
        raises=ValueError,
    ),
    Listed(
        "The test adds its second adapter after eval(), so that the dropout of these configurations is on in it.",
        "test_multiple_active_adapters_merge_and_unmerge",
        "lora mole-one-expert",
        ids="*same:lora *different:lora *different:mole-one-expert",
    ),
    Listed(
        "The test wants other outputs than those of the base model; gates at the mean of the others hardly ever win.",
        "test_safe_merge",
        "moextend-calibrated",
        suites="custom",
    ),
    Listed(
        "The test takes three large steps, in which the load-balancing loss sends all tokens to another expert each "
        "time: none is used twice, as it takes to change its A.",
        "test_only_params_are_updated",
        "mole-top-1",
        ids="EmbConv1D?lin0:*",
    ),
    Listed(
        "Without cluster_ids only the universal expert is used: gates and embeddings stay as they are.",
        "test_only_params_are_updated",
        "mocle-without-ids",
    ),
]

SKIPS = [
    Listed("They train no biases of the base model.", "test_adding_multiple_adapters_with_bias_raises", "m*"),
    Listed("They train no biases of the base model.", "test_disable_adapter_with_bias_warns *_learnable_bias", "m*"),
    Listed(
        "They take one adapter for the whole batch, and refuse adapter_names.",
        "test_mixed_adapter_batches test_generate_with_mixed_adapter_batches",
        "m*",
    ),
    Listed("Adapters with routers cannot be added up into one.", "test_weighted_combination_of_adapters", "m*"),
    Listed(
        "The test wants no modules_to_save; LoRA skips it there too.",
        "test_active_adapter",
        "m*",
        ids="*module?to?save*",
    ),
    Listed("MoExtend names its layers in `layers`.", "test_training_*layer_indexing", "moextend*"),
]


def listed_in(entries: list[Listed], suite: str, test: str, case: str, identifier: str) -> Listed | None:
    """The entry that covers a test with a configuration."""
    return next((entry for entry in entries if entry.covers(suite, test, case, identifier)), None)


def is_run(suite: str, kind: str, test: str) -> bool:
    """Whether `NOT_RUN` does not list a test."""
    name = f"{suite}.{kind}.{test}"
    return not any(fnmatchcase(name, pattern) for patterns in NOT_RUN.values() for pattern in patterns.split())


def problem_with(outcome: str, skip: Listed | None, *, is_control: bool) -> str | None:
    """What is wrong with the outcome (`"passed"`, `"failed"`, `"skipped"`) or its entry in `SKIPS`, if anything."""
    if outcome == "skipped" and skip is None and not is_control:
        return "It is skipped, and SKIPS in expectations.py does not say why."
    if outcome == "passed" and skip is not None:
        return f"It passes, but SKIPS in expectations.py lists it ({skip.reason}). Take it off the list."
    return None
