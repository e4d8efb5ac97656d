"""Targets are found by structure in every architecture, and adapters there work, for every task type of PEFT."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import NoMatchingPeftModuleError, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from peft_moe import MoCLEConfig, MoLEConfig
from peft_moe.tuners.mole import MoLELayer
from tiny_architectures import ARCHITECTURES, BERT, PLAIN, T5, plain, sequence_pair, tokens


# in PEFT's table, but in no row here, and why
NOT_COVERED = {
    "RefinedWeb": "remote code, now falcon",
    "RefinedWebModel": "remote code, now falcon",
    "btlm": "remote code",
    "chatglm": "remote code",
    "mixtral": "its experts are no linears: test_model_without_mlp_is_named",
    "rwkv7": "remote code",
}


def outputs_of(model, batch) -> torch.Tensor:
    """Everything that the model computes, so that no head is left out."""
    output = model(**batch)
    return torch.cat([t.float().flatten() for t in output.values() if isinstance(t, torch.Tensor) and t.numel() > 1])


def routed_layers(model) -> dict[str, MoLELayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoLELayer) and module.scopes}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_every_mlp_gets_experts_that_learn(architecture):
    batch = architecture.inputs()
    with torch.no_grad():
        # frozen, as an adapted model is: nn.MultiheadAttention then takes another path
        expected = outputs_of(architecture.build().requires_grad_(False), batch)
    model = get_peft_model(architecture.build(), MoLEConfig(r=2, num_experts=3, init_lora_weights=False))

    layers = routed_layers(model)
    ends = architecture.mlp.split()
    assert len(layers) == len(ends) * architecture.num_mlps
    assert all(name.endswith(tuple(f".{end}" for end in ends)) for name in layers)
    adapted = [name for name, module in model.named_modules() if isinstance(module, MoLELayer)]
    assert len(adapted) > len(layers), "attention got no LoRA"
    assert all(architecture.inside in name for name in adapted)
    routers = [module for module in layers.values() if "default" in module.mole_router]
    assert len(routers) == architecture.num_mlps

    output = outputs_of(model, batch)
    assert not torch.allclose(output, expected)
    output.square().sum().backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without_gradient == []
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(outputs_of(model, batch), expected)


@pytest.mark.parametrize("model_type", sorted(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING))
def test_every_architecture_that_peft_knows_has_a_row(model_type):
    rows = {row.name for row in ARCHITECTURES} | {row.config().model_type for row in ARCHITECTURES}
    assert model_type in rows or model_type in {row.removesuffix("_text") for row in rows} | set(NOT_COVERED)


def test_model_without_mlp_is_named():
    config = transformers.MixtralConfig(**PLAIN, num_key_value_heads=1, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="found no MLP in MixtralForCausalLM.*target_modules.*single parameters"):
        get_peft_model(model, MoLEConfig())
    assert not routed_layers(model)


def test_shared_expert_of_a_mixture_gets_experts():
    config = transformers.Qwen2MoeConfig(
        **PLAIN, num_key_value_heads=1, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    model = get_peft_model(transformers.Qwen2MoeForCausalLM(config), MoLEConfig(r=2))
    assert all(".shared_expert." in name for name in routed_layers(model))
    assert len(routed_layers(model)) == 6


@pytest.mark.parametrize(
    "target_modules", [None, ["linear1", "linear2"], ["out_proj"]], ids=["default", "mlp", "attention"]
)
def test_layers_of_torch_that_skip_their_linears_are_refused(target_modules):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    with pytest.raises(ValueError, match="without calling them.*exclude_modules"):
        get_peft_model(model, MoLEConfig(r=2, target_modules=target_modules))
    assert not any(isinstance(module, MoLELayer) for module in model.modules())


class CustomMLP(nn.Module):
    """No name that a structure would be recognised by."""

    def __init__(self):
        super().__init__()
        self.widen = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 4)

    def forward(self, x):
        return self.narrow(torch.relu(self.widen(x)))


def test_custom_module_is_adapted_by_name_with_one_router_per_parent():
    model = nn.Sequential(CustomMLP(), nn.Linear(4, 8), CustomMLP())
    config = MoLEConfig(r=2, target_modules=["widen", "narrow"], init_lora_weights=False)
    x = torch.randn(5, 8)
    expected = model(x)
    model = get_peft_model(model, config)
    layers = routed_layers(model)
    assert [("default" in layer.mole_router) for layer in layers.values()] == [True, False, True, False]
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_custom_module_without_names_says_what_to_do():
    with pytest.raises(ValueError, match="found no MLP in CustomMLP.*name yours in target_modules"):
        get_peft_model(CustomMLP(), MoLEConfig())


def adapted_llama(**settings):
    return get_peft_model(transformers.LlamaForCausalLM(plain("LlamaConfig")()), MoLEConfig(**{"r": 2, **settings}))


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": r".*\.1\.mlp\..*_proj"}, {"layers_to_transform": [1], "layers_pattern": "layers"}],
    ids=["regular-expression", "layers-to-transform"],
)
def test_one_layer_is_picked(settings):
    layers = routed_layers(adapted_llama(**settings))
    assert len(layers) == 3
    assert all(".layers.1." in name for name in layers)


@pytest.mark.parametrize("config_class", [MoLEConfig, MoCLEConfig])
def test_layers_to_transform_picks_layers_where_attention_and_mlp_share_a_name(config_class):
    gpt2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2-conv1d")
    model = get_peft_model(gpt2.build(), config_class(r=2, layers_to_transform=[0]))
    assert model.targeted_module_names and all(".h.0." in name for name in model.targeted_module_names)


@pytest.mark.parametrize("config_class", [MoLEConfig, MoCLEConfig])
def test_layers_that_the_model_lacks_are_named(config_class):
    gpt2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2-conv1d")
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"layers_to_transform=\[99\] .* leave none of the \d+ linears"
    ):
        get_peft_model(gpt2.build(), config_class(r=2, layers_to_transform=[99]))


def test_layers_given_as_a_range_are_saved_as_a_list(tmp_path):
    adapted_llama(layers_to_transform=range(1)).save_pretrained(tmp_path)
    assert MoLEConfig.from_pretrained(tmp_path).layers_to_transform == [0]


def test_excluded_modules_stay_as_they_are():
    model = adapted_llama(exclude_modules=["down_proj"])
    assert len(routed_layers(model)) == 4


def test_all_linear_gives_experts_to_attention_too():
    model = adapted_llama(target_modules="all-linear")
    layers = routed_layers(model)
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)
    model(torch.ones(1, 3, dtype=torch.long))


def test_number_of_experts_may_differ_between_mlps():
    model = adapted_llama(num_experts=3, num_experts_pattern={"layers.0.mlp": 5})
    counts = {name: layer.mole_A["default"].weight.shape[0] for name, layer in routed_layers(model).items()}
    assert {5 if ".layers.0." in name else 3 for name in counts} == set(counts.values())
    assert all(count == (5 if ".layers.0." in name else 3) for name, count in counts.items())
    model(torch.ones(1, 3, dtype=torch.long))


def test_rank_and_alpha_may_differ_between_linears():
    model = adapted_llama(lora_alpha=4, rank_pattern={"up_proj": 3}, alpha_pattern={"layers.1.mlp.up_proj": 12})
    up = [layer for name, layer in routed_layers(model).items() if name.endswith("up_proj")]
    assert [layer.mole_A["default"].weight.shape[1] for layer in up] == [3, 3]
    assert [layer.scaling["default"] for layer in up] == [4 / 3, 4.0]
    model(torch.ones(1, 3, dtype=torch.long))


def test_rank_stabilised_scaling_divides_by_the_root():
    model = adapted_llama(r=4, lora_alpha=6, use_rslora=True)
    assert {layer.scaling["default"] for layer in routed_layers(model).values()} == {3.0}


def bert(model: str, **overrides):
    return lambda: getattr(transformers, model)(transformers.BertConfig(**{**BERT, **overrides}))


def llama(model: str, **overrides):
    return lambda: getattr(transformers, model)(transformers.LlamaConfig(**{**PLAIN, **overrides}))


SPAN = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
TASKS = {
    "sequence-classification-encoder": (
        "SEQ_CLS",
        bert("BertForSequenceClassification"),
        {"labels": torch.tensor([0, 1])},
    ),
    "sequence-classification-decoder": (
        "SEQ_CLS",
        llama("LlamaForSequenceClassification", num_labels=3),
        {"labels": torch.tensor([0, 2])},
    ),
    "token-classification": ("TOKEN_CLS", bert("BertForTokenClassification"), {"labels": torch.ones(2, 6).long()}),
    "question-answering": ("QUESTION_ANS", bert("BertForQuestionAnswering"), SPAN),
    "causal-language-model": ("CAUSAL_LM", llama("LlamaForCausalLM"), {"labels": torch.ones(2, 6).long()}),
    "sequence-to-sequence": (
        "SEQ_2_SEQ_LM",
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        {"labels": torch.ones(2, 4).long()},
    ),
    "feature-extraction": ("FEATURE_EXTRACTION", bert("BertModel"), {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_task_type_trains_and_comes_back_to_the_bit(task, tmp_path):
    task_type, build, labels = TASKS[task]
    batch = {**(sequence_pair() if task_type == "SEQ_2_SEQ_LM" else tokens()), **labels}
    torch.manual_seed(0)
    base = build()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, MoLEConfig(r=2, init_lora_weights=False, task_type=task_type)).train()
    output = model(**batch)
    (output.loss if labels else output.last_hidden_state.square().mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval().save_pretrained(tmp_path)
    fresh = build()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        found, expected = loaded(**batch), model(**batch)
    assert found.keys() == expected.keys()
    for name in ("loss", "logits", "start_logits", "last_hidden_state"):
        if name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_encoder_decoder_generates():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model = get_peft_model(model, MoLEConfig(r=2, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")).eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    cached, uncached = (model.generate(**tokens(), use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached)
