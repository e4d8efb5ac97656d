"""`MoeLlavaConfig`: placement, problems, round trip."""

from __future__ import annotations

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError

from models.tiny_llava import llava_fields, text_config
from peft_moe.models import MoeLlavaConfig, register


def config_of(**fields) -> MoeLlavaConfig:
    return MoeLlavaConfig(**{**llava_fields(num_hidden_layers=5), **fields})


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("interval", [0, 2, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ([3, 1], [1, 3]),
    ],
    ids=["interval", "all", "first_half", "second_half", "list"],
)
def test_placement_selects_the_layers_of_the_original(placement, layers):
    assert config_of(moe_layers=placement).moe_layer_indices == layers


def test_experts_may_differ_by_layer():
    assert config_of(num_experts=[2, 4, 8]).num_experts_by_layer == {0: 2, 2: 4, 4: 8}
    assert config_of(num_experts=3, moe_layers=[1]).num_experts_by_layer == {1: 3}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moe_layers": [0, 5]}, r"names \[5\], but the text model has layers 0 to 4"),
        ({"moe_layers": [1, 1]}, "names a layer twice"),
        ({"moe_layers": []}, r"moe_layers=\[\] selects no layer"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"num_experts": [4, 4]}, r"lists 2 numbers, but 3 layers are mixtures \(\[0, 2, 4\]\)"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, but a layer has only 2 experts"),
        ({"num_experts": [4, 2, 4], "num_experts_per_tok": 3}, "has only 2 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1"),
        ({"router_second_expert": "gumbel", "num_experts_per_tok": 1}, "samples the second of two experts"),
        ({"num_experts": [2, 4, 4], "router_aux_loss_type": "pooled"}, "same number of experts in every layer"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be 0 or more"),
        ({"router_capacity_factor": 0}, "router_capacity_factor must be more than 0"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef must be 0 or more"),
        ({"router_min_capacity": -1}, "router_min_capacity must be 0 or more"),
        ({"router_jitter_noise": 1.0}, r"router_jitter_noise must be in \[0, 1\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_error_names_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=words):
        config_of(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_layers", "every_third"),
        ("moe_layers", 2),
        ("num_experts", True),
        ("num_experts", 2.0),
        ("num_experts_per_tok", "2"),
        ("router_drop", "random"),
        ("router_aux_loss_type", "gshard"),
        ("router_jitter_noise", "0.1"),
        ("use_residual", "yes"),
    ],
)
def test_another_type_or_none_of_the_choices_is_refused_also_later(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        config_of(**{name: value})
    config = config_of()
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        setattr(config, name, value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        config_of(moe_layers=[9], num_experts=-1, router_min_capacity=-1, router_jitter_noise=2)
    for name in ("moe_layers", "num_experts", "router_min_capacity", "router_jitter_noise"):
        assert f"- {name}" in str(error.value)


def test_round_trip_through_json(tmp_path):
    config = config_of(
        moe_layers=[0, 3], num_experts=[2, 4], num_experts_per_tok=1, use_residual=True, router_drop="probability"
    )
    config.save_pretrained(tmp_path)
    loaded = MoeLlavaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.text_config, transformers.LlamaConfig)
    register()
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is MoeLlavaConfig


def test_default_is_the_paper():
    config = MoeLlavaConfig()
    assert (config.moe_layers, config.num_experts, config.num_experts_per_tok) == ("interval", 4, 2)
    assert config.moe_layer_indices == list(range(0, 32, 2))
    assert config.router_drop is None


def test_released_code_is_one_call():
    config = MoeLlavaConfig.released_code(**llava_fields())
    assert (config.router_drop, config.router_capacity_factor, config.router_second_expert) == (
        "position",
        1.5,
        "gumbel",
    )
    assert config.router_aux_loss_type == "moe_llava"
    single = MoeLlavaConfig.released_code(**llava_fields(), num_experts_per_tok=1)
    # there is no second expert to sample, and the only one weighs by its probability
    assert (single.router_second_expert, single.norm_topk_prob) == ("top", False)


def test_router_logits_flag_reaches_the_text_model_whenever_it_is_set():
    config = config_of()
    config.output_router_logits = True
    assert config.text_config.output_router_logits is True
    assert config_of(output_router_logits=True).text_config.output_router_logits is True


def test_text_model_says_what_trainers_of_others_look_for():
    config = config_of(num_experts=8, router_aux_loss_coef=0.3)
    text = config.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.router_aux_loss_coef) == (8, 2, 0.3)
    config.router_aux_loss_coef = 0.0
    assert text.router_aux_loss_coef == 0.0


def test_experts_implementation_spares_the_vision_tower():
    config = config_of(experts_implementation="batched_mm")
    assert config.text_config._experts_implementation == "batched_mm"
    assert config.vision_config._experts_implementation is None


def test_sub_configurations_may_be_dictionaries():
    fields = llava_fields()
    config = MoeLlavaConfig(
        text_config=text_config("phi").to_dict(), vision_config=fields["vision_config"].to_dict(), moe_layers="all"
    )
    assert isinstance(config.text_config, transformers.PhiConfig)
    assert config.moe_layer_indices == [0, 1, 2]


def test_the_given_text_configuration_is_left_as_it_is():
    text = text_config()
    before = text.to_dict()
    config = config_of(text_config=text)
    config.num_experts, config.router_aux_loss_coef = 2, 0.5
    assert text.to_dict() == before
    assert not hasattr(text, "num_experts")


def test_values_changed_on_the_text_configuration_are_saved(tmp_path):
    config = config_of()
    config.text_config.router_aux_loss_coef = 0.0
    config.text_config.output_router_logits = True
    config.save_pretrained(tmp_path)
    loaded = MoeLlavaConfig.from_pretrained(tmp_path)
    assert (loaded.router_aux_loss_coef, loaded.output_router_logits) == (0.0, True)
    assert loaded.text_config.router_aux_loss_coef == 0.0
