"""`MoeTuningStage`: each stage trains what its audit says and nothing else, under Trainer, also with adapters."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from models.tiny_llava import BACKBONES, sparse_llava, text_config, tiny_llava, train
from peft_moe import MoLEConfig
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava.stages import MoeTuningStage


# names alone would fit the vision tower too
TEXT_ATTENTION = r".*language_model.*self_attn\.(q|k|v|o)_proj"
GROUP_MARKS = {
    "vision tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "embeddings": "embed_tokens.",
    "attention": "self_attn.",
    "dense MLPs": "layers.1.mlp.",
    "routers": "mlp.gate.weight",
    "experts": "mlp.experts.",
    "norms": "norm.",
    "lm_head": "lm_head.",
}
EVERYTHING_ELSE = [group for group in GROUP_MARKS if group != "vision tower"]
OF_STAGE_III = ["dense MLPs", "routers", "experts"]
MIXTURES_ONLY = MoeTuningStage("III", dense_mlps=False, projector=False)
ON_DENSE = [group for group in EVERYTHING_ELSE if group not in ("routers", "experts")]


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_names(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("make", "stage", "groups"),
    [
        pytest.param(tiny_llava, MoeTuningStage("I"), ["projector"], id="I-dense"),
        pytest.param(sparse_llava, MoeTuningStage("I"), ["projector"], id="I-sparse"),
        pytest.param(tiny_llava, MoeTuningStage("II"), ON_DENSE, id="II-dense"),
        pytest.param(sparse_llava, MoeTuningStage("II"), EVERYTHING_ELSE, id="II-sparse"),
        pytest.param(sparse_llava, MoeTuningStage("III"), ["projector", *OF_STAGE_III], id="III-released-code"),
        pytest.param(sparse_llava, MoeTuningStage("III", projector=False), OF_STAGE_III, id="III-figure-3"),
        pytest.param(sparse_llava, MIXTURES_ONLY, ["routers", "experts"], id="III-mixtures-only"),
    ],
)
def test_trainer_changes_what_the_audit_names_and_nothing_else(tmp_path, make, stage, groups):
    model = make()
    audit = stage.apply(model)
    assert set(audit.trained_groups) == set(groups)
    before = state_of(model)
    train(model, tmp_path)
    marks = [".mlp." if group == "dense MLPs" and make is tiny_llava else GROUP_MARKS[group] for group in groups]
    expected = {
        name for name in before if any(mark in name for mark in marks) and not name.startswith("model.vision_tower")
    }
    assert changed_names(model, before) == expected
    assert sum(audit.trainable.values()) == sum(before[name].numel() for name in expected)
    assert sum(audit.total.values()) == sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_of_every_backbone_has_a_group(backbone):
    audit = MoeTuningStage("III").apply(sparse_llava(backbone))
    assert audit.total["other"] == 0
    assert all(audit.total[group] for group in ("attention", "dense MLPs", "routers", "experts", "norms"))


def test_a_residual_expert_counts_as_an_expert():
    model = sparse_llava(use_residual=True)
    MIXTURES_ONLY.apply(model)
    block = model.model.language_model.layers[0].mlp
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_stages_follow_one_another():
    model = sparse_llava()
    first = MoeTuningStage("III").apply(model)
    MoeTuningStage("I").apply(model)
    MoeTuningStage("II").apply(model)
    assert MoeTuningStage("III").apply(model) == first


def test_tied_embeddings_are_counted_once():
    model = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(tie_word_embeddings=True))
    audit = MoeTuningStage("II").apply(model)
    assert (audit.total["embeddings"], audit.total["lm_head"]) == (64 * 32, 0)
    assert model.lm_head.weight.requires_grad


def test_the_audit_is_a_table_and_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="peft_moe.models.moe_llava.stages"):
        audit = MoeTuningStage("I").apply(tiny_llava())
    table = str(audit)
    assert table in caplog.text
    lines = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert lines["projector"] == ["projector", "1,600", "1,600", "100.0%"]
    assert lines["all"][1] == "1,600"


def test_stage_three_on_a_dense_model_names_from_dense_and_changes_nothing():
    model = tiny_llava()
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has none.*from_dense"):
        MoeTuningStage("III").apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_stage_three_names_mixtures_that_are_missing():
    model = sparse_llava()
    layers = model.model.language_model.layers
    layers[2].mlp = tiny_llava().model.language_model.layers[2].mlp
    with pytest.raises(ValueError, match=r"layers \[2\] of MoeLlavaForConditionalGeneration have none.*\[0, 2\]"):
        MoeTuningStage("III").apply(model)


@pytest.mark.parametrize("layers", [(0, 2), (2,)], ids=["all", "some"])
def test_weights_that_cannot_train_are_refused(layers):
    model = sparse_llava()
    for index in layers:
        experts = model.model.language_model.layers[index].mlp.experts
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, torch.nn.Parameter(parameter.to(torch.int8), requires_grad=False))
    words = r"trains the experts of .*but \d of these weights are quantised.*of torch.int8.*without quantization"
    with pytest.raises(ValueError, match=words):
        MoeTuningStage("III").apply(model)


def test_quantised_weights_that_claim_to_be_floating_point_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = sparse_llava()
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig(version=2))
    with pytest.raises(
        ValueError, match="Stage II trains the attention, dense MLPs.*are quantised.*q_proj.weight is Int8"
    ):
        MoeTuningStage("II").apply(model)
    with pytest.raises(ValueError, match="Stage III trains the dense MLPs .*are quantised"):
        MoeTuningStage("III").apply(model)
    assert MoeTuningStage("III", dense_mlps=False).apply(model).trainable["attention"] == 0


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="needs a LLaVA, but LlamaForCausalLM has no multi_modal_projector"):
        MoeTuningStage("II").apply(transformers.LlamaForCausalLM(text_config()))


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="'I', 'II', 'III', but found 3"):
        MoeTuningStage(3)


def adapted(kind: str, *, saved: bool = True) -> PeftModel:
    """LoRA or MoLE on the attention, and copies of what stage III trains besides, which PEFT saves."""
    torch.manual_seed(0)
    model = sparse_llava()
    names = MoeTuningStage("III").modules_to_save(model) if saved else None
    config = {
        "lora": LoraConfig(r=2, target_modules=TEXT_ATTENTION, modules_to_save=names, init_lora_weights=False),
        "mole": MoLEConfig(r=2, num_experts=2, target_modules=TEXT_ATTENTION, modules_to_save=names),
    }[kind]
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["lora", "mole"])
def test_adapters_train_beside_the_mixtures(tmp_path, kind):
    model = adapted(kind)
    audit = MoeTuningStage("III").apply(model)
    assert set(audit.trained_groups) == {"projector", "dense MLPs", "routers", "experts", "adapters"}
    assert audit.not_saved == ()
    before = state_of(model)
    train(model, tmp_path)
    changed = changed_names(model, before)
    assert changed == trained_names(model)
    prefix = {"lora": "lora_", "mole": "mole_"}[kind]
    assert all(prefix in name or ".modules_to_save." in name for name in changed)
    assert any(prefix in name for name in changed)


def test_what_an_adapter_would_not_save_is_said(caplog):
    model = adapted("lora", saved=False)
    with caplog.at_level(logging.WARNING, logger="peft_moe.models.moe_llava.stages"):
        audit = MoeTuningStage("III").apply(model)
    assert "modules_to_save=MoeTuningStage('III').modules_to_save(model)" in caplog.text
    assert any("experts.down_proj" in name for name in audit.not_saved)


def test_adapters_of_the_projector_train_in_stage_one_and_those_of_the_text_model_do_not():
    model = get_peft_model(sparse_llava(), LoraConfig(r=2, target_modules=["linear_1", "q_proj"]))
    MoeTuningStage("I").apply(model)
    trained = trained_names(model)
    assert {name.partition("multi_modal_projector.")[2] for name in trained} == {
        "linear_1.lora_A.default.weight",
        "linear_1.lora_B.default.weight",
        "linear_2.weight",
        "linear_2.bias",
    }


def test_adapters_of_the_vision_tower_never_train():
    model = get_peft_model(sparse_llava(), LoraConfig(r=2, target_modules=["q_proj"]))
    for stage in ("I", "II", "III"):
        MoeTuningStage(stage).apply(model)
        assert not any(p.requires_grad for name, p in model.named_parameters() if "vision_tower" in name)


def test_learned_prompts_are_adapters():
    model = get_peft_model(sparse_llava(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    audit = MoeTuningStage("III").apply(model)
    assert audit.trainable["adapters"] == 2 * 32
    assert MoeTuningStage("I").apply(model).trainable["adapters"] == 0


def test_only_the_active_adapter_trains():
    model = get_peft_model(sparse_llava(), LoraConfig(r=2, target_modules=TEXT_ATTENTION))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=TEXT_ATTENTION))
    MoeTuningStage("III").apply(model)
    trained = trained_names(model)
    assert any(".default." in name for name in trained)
    assert not any(".ref." in name for name in trained)


def test_lora_on_the_experts_trains_in_their_place():
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(sparse_llava(), LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    MoeTuningStage("III").apply(model)
    trained = trained_names(model)
    inside = [name for name in trained if ".experts." in name]
    assert inside
    assert all("lora_" in name for name in inside)


@pytest.mark.parametrize("name", ["II", "III"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_the_embeddings_train_in_place_of_the_embeddings(name, tied):
    base = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(tie_word_embeddings=tied))
    config = LoraConfig(r=2, target_modules=TEXT_ATTENTION, trainable_token_indices={"embed_tokens": [3, 4]})
    model = get_peft_model(base, config)
    audit = MoeTuningStage(name).apply(model)
    trained = {n: p.requires_grad for n, p in model.named_parameters() if ".embed_tokens." in n}
    assert {n.partition("token_adapter.")[2]: flag for n, flag in trained.items()} == {
        "base_layer.weight": False,
        "trainable_tokens_delta.default": True,
    }
    assert not any("embed_tokens" in n for n in audit.not_saved)
    MoeTuningStage("I").apply(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "embed_tokens" in n)


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_saved_copy_that_unties_the_embeddings_is_said(caplog, ensure, saved):
    base = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(tie_word_embeddings=True))
    config = LoraConfig(r=2, target_modules=TEXT_ATTENTION, modules_to_save=[saved], ensure_weight_tying=ensure)
    model = get_peft_model(base, config)
    with caplog.at_level(logging.WARNING, logger="peft_moe.models.moe_llava.stages"):
        MoeTuningStage("II").apply(model)
        is_said = "ensure_weight_tying=True" in caplog.text
        is_one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_said == (not is_one)
        caplog.clear()
        MoeTuningStage("III").apply(model)
    assert is_said == (not ensure)
    assert "ensure_weight_tying" not in caplog.text


@pytest.mark.parametrize("name", ["I", "II", "III"])
def test_training_resumes_from_a_checkpoint(tmp_path, name):
    def trained(**arguments):
        model = sparse_llava()
        MoeTuningStage(name).apply(model)
        return train(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **arguments).model

    whole, resumed = trained(), trained(resume_from=str(tmp_path / "checkpoint-2"))
    for (key, found), (_, expected) in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(found, expected), key


def test_callbacks_see_a_stage(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append({id(p) for group in optimizer.param_groups for p in group["params"]})

    model = sparse_llava()
    MIXTURES_ONLY.apply(model)
    train(model, tmp_path, max_steps=1, callbacks=[Watch()])
    assert seen == [{id(p) for p in model.parameters() if p.requires_grad}]


def test_a_stage_trains_under_gradient_checkpointing(tmp_path):
    model = sparse_llava()
    MIXTURES_ONLY.apply(model)
    before = state_of(model)
    train(model, tmp_path, max_steps=1, gradient_checkpointing=True)
    assert changed_names(model, before) == {name for name in before if ".experts." in name or ".mlp.gate." in name}
