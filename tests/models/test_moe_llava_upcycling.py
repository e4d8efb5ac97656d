"""`from_dense`: the sparse model starts as the dense one."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from models.tiny_llava import BACKBONES, TEXT, image_batch, llava_fields, text_config, tiny_llava
from peft_moe.models import MoeLlavaForConditionalGeneration, MoeLlavaModel


def from_dense(dense, **fields) -> MoeLlavaForConditionalGeneration:
    return MoeLlavaForConditionalGeneration.from_dense(dense, **fields)


@torch.no_grad()
def largest_difference(dense, sparse) -> float:
    batch = image_batch(num_padding=2)
    return float((dense(**batch).logits - sparse(**batch).logits).abs().max())


@pytest.mark.parametrize("num_experts_per_tok", [1, 2], ids=["top-1", "top-2"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_equal_those_of_the_dense_model(backbone, num_experts_per_tok):
    dense = tiny_llava(backbone)
    sparse = from_dense(dense, num_experts_per_tok=num_experts_per_tok)
    assert largest_difference(dense, sparse) <= 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"use_residual": True},
        {"moe_layers": "all", "num_experts": [2, 3, 4]},
        {"moe_layers": [1], "num_experts_per_tok": 4},
        {"router_drop": "position", "router_eval_capacity_factor": 4.0},
        {"experts_implementation": "eager"},
    ],
    ids=["residual", "per-layer", "every-expert", "no-drop-in-sight", "eager"],
)
def test_logits_equal_with_options(fields):
    dense = tiny_llava()
    implementation = fields.pop("experts_implementation", None)
    sparse = from_dense(dense, **fields)
    if implementation:
        sparse.set_experts_implementation(implementation)
    assert largest_difference(dense, sparse) <= 1e-5


def test_a_wrong_expert_would_show():
    dense = tiny_llava()
    sparse = from_dense(dense, num_experts=2)
    with torch.no_grad():
        sparse.model.language_model.layers[0].mlp.experts.down_proj[1] *= 1.1
    assert largest_difference(dense, sparse) > 1e-3


@pytest.mark.parametrize("backbone", ["llama", "phi3", "phi"], ids=["gated", "packed", "plain"])
def test_every_expert_is_a_copy(backbone):
    dense = tiny_llava(backbone)
    sparse = from_dense(dense, num_experts=3)
    mlp, experts = dense.model.language_model.layers[2].mlp, sparse.model.language_model.layers[2].mlp.experts
    for expert in range(3):
        if backbone == "llama":
            assert torch.equal(experts.gate_up_proj[expert], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            assert torch.equal(experts.down_proj[expert], mlp.down_proj.weight)
        elif backbone == "phi3":
            assert torch.equal(experts.gate_up_proj[expert], mlp.gate_up_proj.weight)
        else:
            assert torch.equal(experts.up_proj[expert], mlp.fc1.weight)
            assert torch.equal(experts.up_proj_bias[expert], mlp.fc1.bias)
            assert torch.equal(experts.down_proj_bias[expert], mlp.fc2.bias)


def test_layers_that_were_not_chosen_stay_dense():
    sparse = from_dense(tiny_llava(), moe_layers=[1])
    kinds = [type(layer.mlp).__name__ for layer in sparse.model.language_model.layers]
    assert kinds == ["LlamaMLP", "MoeLlavaSparseMoeBlock", "LlamaMLP"]


def test_the_dense_model_is_left_as_it_is():
    dense = tiny_llava()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = from_dense(dense)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert "num_experts" not in dense.config.to_dict()


def test_noise_tells_experts_apart():
    torch.manual_seed(0)
    sparse = from_dense(tiny_llava(), expert_noise=0.01)
    weight = sparse.model.language_model.layers[0].mlp.experts.gate_up_proj
    difference = weight[0] - weight[1]
    # the difference of two draws is wider by the square root of two
    assert 0.5 < float(difference.std() / (0.01 * 2**0.5 * weight[0].std())) < 1.5


def test_experts_come_from_several_dense_models():
    first, second = tiny_llava(seed=0), tiny_llava(seed=1)
    sparse = from_dense([first, second], num_experts=4)
    experts = sparse.model.language_model.layers[0].mlp.experts
    for expert, dense in enumerate([first, second, first, second]):
        assert torch.equal(experts.down_proj[expert], dense.model.language_model.layers[0].mlp.down_proj.weight)
    assert torch.equal(sparse.lm_head.weight, first.lm_head.weight)


def test_dense_models_of_different_sizes_do_not_mix():
    with pytest.raises(ValueError, match="dense model 1 does not fit"):
        from_dense([tiny_llava(), tiny_llava(intermediate_size=64)])
    with pytest.raises(ValueError, match="3 dense models were given, but a layer has only 2"):
        from_dense([tiny_llava()] * 3, num_experts=2)


def test_checkpoint_with_legacy_names_becomes_sparse(tmp_path):
    dense = tiny_llava()
    dense.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert any(key.startswith("language_model.model.") for key in file.keys())
    sparse = from_dense(str(tmp_path))
    assert not sparse.training
    assert largest_difference(dense, sparse) <= 1e-5


def test_tied_embeddings_stay_tied():
    dense = tiny_llava(tie_word_embeddings=True)
    sparse = from_dense(dense)
    assert sparse.lm_head.weight is sparse.model.language_model.embed_tokens.weight
    assert largest_difference(dense, sparse) <= 1e-5


def test_half_precision_is_kept_but_for_the_router():
    sparse = from_dense(tiny_llava().to(torch.bfloat16))
    block = sparse.model.language_model.layers[0].mlp
    assert block.experts.down_proj.dtype == torch.bfloat16
    assert block.gate.weight.dtype == torch.float32


@pytest.mark.parametrize("model_class", [MoeLlavaForConditionalGeneration, MoeLlavaModel])
def test_from_pretrained_on_a_dense_checkpoint_names_from_dense(tmp_path, model_class):
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_dense"):
        model_class.from_pretrained(tmp_path)
    config = from_dense(tiny_llava()).config
    with pytest.raises(ValueError, match="from_dense"):
        model_class.from_pretrained(tmp_path, config=config)


def test_only_a_dense_llava_can_become_sparse(tmp_path):
    with pytest.raises(TypeError, match="found LlamaForCausalLM"):
        from_dense(transformers.LlamaForCausalLM(text_config()))
    sparse = from_dense(tiny_llava())
    with pytest.raises(TypeError, match="found MoeLlavaForConditionalGeneration"):
        from_dense(sparse)
    sparse.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="of type 'moe_llava'"):
        from_dense(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MixtralConfig(**TEXT, num_local_experts=2), "MixtralSparseMoeBlock, a mixture already"),
        (text_config("starcoder2", residual_dropout=0.1), "residual_dropout=0.1"),
        (transformers.ApertusConfig(**TEXT), r"act_fn\.alpha_p \(a weight of the activation\)"),
    ],
    ids=["mixture", "dropout", "activation-with-weights"],
)
def test_mlps_that_cannot_become_experts_are_refused(config, message):
    dense = transformers.LlavaConfig(**{**llava_fields(), "text_config": config})
    with pytest.raises(ValueError, match=message):
        from_dense(transformers.LlavaForConditionalGeneration(dense))


@pytest.mark.parametrize(("position", "layer"), [(0, 0), (0, 2), (1, 2)], ids=["layer-0", "layer-2", "second-model"])
@pytest.mark.parametrize("expert_noise", [0.0, 0.5], ids=["copies", "noise"])
def test_an_mlp_that_only_looks_like_one_is_refused(position, layer, expert_noise):
    models = [tiny_llava(seed=0), tiny_llava(seed=1)]
    mlp = models[position].model.language_model.layers[layer].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))
    with pytest.raises(ValueError, match=f"LlamaMLP computes something else .* layer {layer}"):
        from_dense(models, expert_noise=expert_noise)


@pytest.mark.parametrize("from_folder", [False, True], ids=["model", "folder"])
def test_implementation_of_the_experts_is_that_of_the_sparse_model(tmp_path, from_folder):
    dense = tiny_llava()
    if from_folder:
        dense.save_pretrained(tmp_path)
    sparse = from_dense(str(tmp_path) if from_folder else dense, experts_implementation="batched_mm")
    assert sparse.model.language_model.config._experts_implementation == "batched_mm"
    assert largest_difference(dense, sparse) <= 1e-5
    with pytest.raises(ValueError, match="fastest"):
        from_dense(tiny_llava(), experts_implementation="fastest")


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["linear_1"]}],
    ids=["lora", "saved"],
)
def test_adapters_have_to_be_merged_first(fields):
    adapted = get_peft_model(tiny_llava(), LoraConfig(r=2, init_lora_weights=False, **fields))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(TypeError, match="without adapters.*merge_and_unload"):
            from_dense(model)
    merged = adapted.merge_and_unload()
    assert largest_difference(merged, from_dense(merged)) <= 1e-5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="expert_noise must not be negative"):
        from_dense(tiny_llava(), expert_noise=-0.1)
    with pytest.raises(TypeError, match="num_expert cannot be used .* num_experts"):
        from_dense(tiny_llava(), num_expert=3)
