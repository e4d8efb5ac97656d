"""Which of PEFT's tests do not run at all, and why. The others run with LoRA and with configurations of ours."""

from __future__ import annotations

from fnmatch import fnmatchcase


# reason → patterns of suite.Class.test, with spaces between; the first that matches counts
LEFT_OUT = {
    "It is about prompt learning.": "*.test_prompt_* *.test_*_prompt_learning* *.test_prefix_tuning* *_prefix_tuning "
    "feature_extraction.*.test_passing_input_embeds_works *.test_use_prompt_tuning_init_text_raises *.test_past_kv "
    "tuners_utils.*.test_adaption_prompt",
    "It is about another method of PEFT, which it names.": "*adalora* *AdaLora* *.test_*ia3* *_loha_* *_lokr *_boft_* "
    "*_oft_* *_fourierft_* *_hra_* *_lntuning_* *_miss_* *_pvera_* *_randlora_* *_vblora* *_vera* *_glora_* "
    "*_gralora_* *_monteclora_* *_osf initialization.TestShadow* initialization.TestLokr* initialization.TestAdamss* "
    "initialization.TestFrod* initialization.TestVelora* initialization.TestKasa* initialization.TestC3A* "
    "initialization.TestWaveFT* initialization.TestRoad* initialization.TestDeLoRA* initialization.TestGraLoRA* "
    "initialization.TestPsoft* initialization.TestPeanut* initialization.TestBeft* initialization.TestSupertuning* "
    "initialization.TestHira* initialization.TestHra* initialization.TestLily* initialization.TestTinyLora* "
    "initialization.TestLoraInitialization.test_error_raised_if_rank_not_divisible_by_groups "
    "low_level_api.*_rejects_shared_state_tuners",
    "It is about embeddings, convolutions, attention modules or tied weights, which our tuners do not adapt.": ""
    "*_targeting_lora_to_embedding_layer* *_lora_embedding_* *_mica_embedding_* *_bias_embedding_* "
    "*_repr_lora_embedding "
    "*_load_resized_embedding_* *conv1d* *conv2d* *_mha_* *multihead* *.test_lora_embed_scale_* tuners_utils.*_large "
    "*_lora_layer_replication initialization.TestWeightTying.* tuners_utils.TestBaseTunerWarnForTiedEmbeddings.* "
    "*_tie_word_embeddings_* tuners_utils.*_enabled_irregular tuners_utils.*_adapters_irregular "
    "tuners_utils.*_requires_grad*_irregular",
    "It is about a field that LoRA's configuration has and ours have not.": ""
    "*dora* *trainable_token* *trainble_tokens* "
    "*target_parameter* *TargetedParameter* initialization.*_with_bias_* *_lora_bias_* *_non_finite_bias "
    "*_bias_in_module_name *_bdlora_* *_mica_* *pissa* *olora* *rslora* *_orthogonal* *mamba* *.TestCorda* *.TestEva* "
    "*.TestLoraNestedConfigRoundTrip.* *_save_shared_tensors custom.TestDynamicDispatch.*",
    "It looks at the parameters, the scaling or the names of LoRA's layers.": "*.test_repr_lora_* "
    "initialization.TestScaling.* initialization.TestLoraInitialization.test_lora_* custom.TestMultiRankAdapter.* "
    "*.test_modules_to_save_targets_lora_layer_raises custom.TestRequiresGrad.test_requires_grad_* "
    "custom.TestRequiresGrad.test_loading_adapter_* low_level_api.TestLowLevelFunctional.* "
    "tuners_utils.*.test_filter_state_dict_by_key_prefixes tuners_utils.*.test_prefixes_lora "
    "tuners_utils.*.test_prefixes_model_with_injected_layers_only tuners_utils.*.test_prefixes_multiple_adapters_* "
    "tuners_utils.*.test_prefixes_select_* tuners_utils.*.test_prefixes_tuner_layer_* "
    "tuners_utils.*_module_type_small "
    "tuners_utils.*_adapter_model_type_small tuners_utils.*_peft_types_small tuners_utils.*_nb_params_small "
    "tuners_utils.*_model_status_with_modules_to_save tuners_utils.*_model_with_injected_layers "
    "tuners_utils.*_module_matching_lora tuners_utils.*.test_realistic_example "
    "tuners_utils.*_get_peft_model_applies_find_target_modules "
    "low_level_api.*_base_model_module_named_like_peft_prefix "
    "low_level_api.*_keys_warning low_level_api.*_warns_for_unsharded_state_dict",
    "It expects an error in LoRA's words; ours say it in others.": ""
    "config.*_lora_config_layers_to_transform_validation config.*_regex_with_layer_indexing_lora",
    "It adds adapters up, merges them, or mixes them in one batch; ours with routers refuse to.": ""
    "custom.*_weighted_adapter_[nsw]* "
    "*.TestMixedAdapterBatches.* *_merging_adapters* torch_compile.*_merg* torch_compile.*_mixed_batch_* "
    "torch_compile.*_weighted_*",
    "It exchanges the weights of LoRA for those of another adapter in place.": "initialization.TestHotSwapping.*",
    "It asks which linears 'all-linear' picks in models of the Hub.": "tuners_utils.*all_linear*",
    "It calls functions of PEFT, and no tuner.": "tuners_utils.TestFindMinimalTargetModules.test_find_* "
    "tuners_utils.TestFindMinimalTargetModules.test_suffix_* tuners_utils.TestBaseTunerGetModelConfig.* "
    "tuners_utils.*_regex_matching_valid_* tuners_utils.*.test_vanilla_* "
    "tuners_utils.*_no_matching_peft_module_error_hierarchy config.*.test_from_peft_type",
    "It needs a model, an adapter or a data set of the Hub, a GPU or diffusers.": ""
    "config.*.test_from_pretrained_cache_dir* "
    "initialization.TestLoadAdapterOfflineMode.* *_stable_diffusion *_bnb_compile *_weight_conversion "
    "low_level_api.*_prefix_removal_is_undone tuners_utils.*.test_transformer* tuners_utils.*_transformers_automodel "
    "custom.*_automatic_modules_to_save",
    "It mixes methods in a PeftMixedModel, which takes a fixed list of PEFT's own.": "*.test_mixed_model_raises",
    "Its like runs with every configuration in another suite.": ""
    "encoder_decoder.*.test_load_model_low_cpu_mem_usage feature_extraction.*.test_load_model_low_cpu_mem_usage "
    "initialization.TestLowCpuMemUsage.*",
    "It compiles a quantised base model into C++, which takes long.": "torch_compile.*_lora_*",
}

# suites in which no mixture of experts gets new ones, and why
WITHOUT_NEW_EXPERTS = {
    "encoder_decoder": "No mixture of an encoder-decoder can be extended.",
    "vision": "No mixture of an image classifier can be extended.",
    "mapping": "The tests make their own model, of plain linears.",
    "low_level_api": "The tests make their own models, of plain linears.",
    "tuners_utils": "The tests make their own models, of plain linears.",
    "initialization": "The tests make their own models, of plain linears.",
}


def reason_for(suite: str, kind: str, test: str) -> str | None:
    """Why a test is left out, `None` if it is to run."""
    name = f"{suite}.{kind}.{test}"
    for reason, patterns in LEFT_OUT.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None
