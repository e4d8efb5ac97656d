"""MoeLlava as a model of transformers: implementations, saving, generation, losses, checkpointing, Auto classes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from models.tiny_llava import (
    BACKBONES,
    IMAGE_TOKEN,
    image_batch,
    labels_of,
    llava_fields,
    run_python,
    sparse_llava,
    tiny_llava,
    tiny_processor,
)
from peft_moe.models import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaModel, register
from peft_moe.models.moe_llava.routing import load_balancing_loss


def loss_and_gradients(model, batch, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, labels=labels_of(batch), use_cache=False, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerances, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backbone", ["llama", "llama-bias", "phi", "nemotron"], ids=lambda name: name)
def test_implementations_of_the_experts_agree(backbone):
    model = sparse_llava(backbone).train()
    batch = image_batch(num_padding=2)
    model.set_experts_implementation("eager")
    assert model.model.language_model.config._experts_implementation == "eager"
    expected_loss, expected = loss_and_gradients(model, batch)
    assert any("experts" in name for name in expected)
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        loss, gradients = loss_and_gradients(model, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients, expected, rtol=1e-4, atol=1e-4)


def test_default_implementation_does_not_depend_on_what_was_built_before():
    tiny_llava()
    assert sparse_llava().model.language_model.config._experts_implementation == "grouped_mm"


def test_implementation_is_chosen_while_loading(tmp_path):
    sparse_llava().save_pretrained(tmp_path)
    model = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert model.model.language_model.config._experts_implementation == "batched_mm"
    with pytest.raises(ValueError, match="fastest"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="fastest")


def test_uneven_sizes_run_and_a_named_grouped_mm_says_why_not():
    dense = tiny_llava(intermediate_size=37)
    model = MoeLlavaForConditionalGeneration.from_dense(dense)
    assert model.model.language_model.config._experts_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model(**image_batch()).logits, dense(**image_batch()).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="intermediate_size=37.*'batched_mm'"):
        model.set_experts_implementation("grouped_mm")


LOAD = """
import json, sys
if sys.argv[3] == "without":
    sys.modules["peft_moe"] = None
else:
    from peft_moe.models import register
    register()
import torch, transformers
torch.set_num_threads(1)
batch = torch.load(sys.argv[2])
auto = getattr(transformers, sys.argv[4])
model = auto.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "without")
with torch.no_grad():
    output = model(**batch)
torch.save(output[0], sys.argv[2])
print(json.dumps([type(model).__name__, type(model).__module__]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "auto"),
    [
        ("with", "AutoModelForImageTextToText"),
        ("without", "AutoModelForImageTextToText"),
        ("without", "AutoModelForMultimodalLM"),
        ("without", "AutoModel"),
    ],
)
def test_checkpoint_gives_the_same_bits_in_a_fresh_process(tmp_path, package, auto):
    """Also where this package is not installed."""
    if not hasattr(transformers, auto):
        pytest.skip(f"this transformers has no {auto}")
    fields = {"use_residual": True, "moe_layers": [0, 2], "num_experts": [2, 4]} if package == "with" else {}
    model = sparse_llava("llama" if package == "with" else "phi", **fields)
    model.save_pretrained(tmp_path)
    batch, file = image_batch(num_padding=2), tmp_path / "batch.pt"
    torch.save(batch, file)
    printed = run_python("-c", LOAD, tmp_path, file, package, auto, HF_MODULES_CACHE=str(tmp_path / "modules"))
    name, module = json.loads(printed.splitlines()[-1])
    assert name == ("MoeLlavaModel" if auto == "AutoModel" else "MoeLlavaForConditionalGeneration")
    assert module.split(".")[0] == ("peft_moe" if package == "with" else "transformers_modules")
    with torch.no_grad():
        expected = model.model(**batch)[0] if auto == "AutoModel" else model(**batch).logits
    assert torch.equal(torch.load(file), expected)


def test_auto_classes_know_the_model(tmp_path):
    register()
    register()
    model = sparse_llava()
    model.save_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is MoeLlavaConfig
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is MoeLlavaModel
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if hasattr(transformers, name):
            assert type(getattr(transformers, name).from_pretrained(tmp_path)) is MoeLlavaForConditionalGeneration
    assert type(transformers.AutoModelForImageTextToText.from_config(model.config)) is type(model)
    assert PROCESSOR_MAPPING[MoeLlavaConfig] is transformers.LlavaProcessor


def test_pipeline_answers_about_an_image(tmp_path):
    register()
    sparse_llava().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    pipeline = transformers.pipeline("image-text-to-text", model=str(tmp_path))
    assert type(pipeline.model) is MoeLlavaForConditionalGeneration
    image = Image.new("RGB", (20, 16), (200, 30, 60))
    (answer,) = pipeline(images=[image], text=["<image> a b c"], generate_kwargs={"max_new_tokens": 3})
    assert isinstance(answer["generated_text"], str)


def test_sharded_checkpoint_and_device_map(tmp_path):
    model = sparse_llava()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        assert torch.equal(loaded(**image_batch()).logits, model(**image_batch()).logits)


def test_model_from_a_configuration_is_initialised():
    torch.manual_seed(0)
    config = MoeLlavaConfig(**llava_fields("phi"), use_residual=True)
    model = MoeLlavaForConditionalGeneration(config)
    block = model.model.language_model.layers[0].mlp
    assert 0.015 < block.experts.up_proj.std().item() < 0.025
    assert float(block.experts.up_proj_bias.abs().max()) == 0
    assert float(block.gate.weight.abs().max()) <= 1 / 32**0.5
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# without a cache, an image token that the model makes up would need an image
GENERATION = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


@pytest.mark.parametrize("backbone", ["llama", "phi", "gemma2"])
def test_generation_with_cache_equals_generation_without(backbone):
    model, batch = sparse_llava(backbone), image_batch(num_padding=2)
    expected = model.generate(**batch, **GENERATION, use_cache=False)
    assert torch.equal(model.generate(**batch, **GENERATION), expected)
    assert torch.equal(model.generate(**batch, **GENERATION, cache_implementation="static"), expected)


def test_beams_with_cache_equal_beams_without():
    model, batch = sparse_llava(), image_batch(num_padding=2)
    expected = model.generate(**batch, **GENERATION, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(**batch, **GENERATION, num_beams=3), expected)


def test_router_logits_during_cached_decoding():
    model, batch = sparse_llava(), image_batch(num_padding=2)
    model.config.output_router_logits = True
    first = model(**batch, use_cache=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    step = model(input_ids=torch.full((2, 1), 9), attention_mask=mask, past_key_values=first.past_key_values)
    assert [logits.shape for logits in step.router_logits] == [(2, 4), (2, 4)]
    # both new tokens count, though one of the samples begins with padding
    assert torch.equal(step.aux_loss, load_balancing_loss(step.router_logits, top_k=2))


def test_flag_set_on_the_configuration_later_is_obeyed():
    model, batch = sparse_llava(), image_batch()
    model.config.output_router_logits = True
    assert len(model(**batch).router_logits) == 2
    assert len(model.model(**batch).router_logits) == 2
    model.config.output_router_logits = False
    assert model(**batch).router_logits is None


def test_tuple_output_keeps_the_order_of_llava():
    model, batch = sparse_llava(), image_batch()
    loss, logits, *_ = model(**batch, labels=labels_of(batch), return_dict=False)
    assert loss.shape == () and logits.shape == (2, 11, 64)


@pytest.mark.parametrize("router_drop", [None, "position"], ids=["dropless", "capacity"])
def test_gradient_checkpointing_changes_no_gradient(router_drop):
    model = sparse_llava(router_drop=router_drop, router_capacity_factor=0.5, router_z_loss_coef=0.1).train()
    batch = image_batch(num_padding=3)
    expected_loss, expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = loss_and_gradients(model, batch)
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(gradients, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backbone", ["llama", "phi"])
def test_half_precision_trains(tmp_path, backbone):
    sparse_llava(backbone).save_pretrained(tmp_path)
    model = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    block = model.model.language_model.layers[0].mlp
    assert block.experts.down_proj.dtype == torch.bfloat16
    assert block.gate.weight.dtype == torch.float32
    batch = image_batch(num_padding=2)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    loss, gradients = loss_and_gradients(model, batch)
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert float(gradients["model.language_model.layers.0.mlp.gate.weight"].abs().max()) > 0


def test_autocast_trains():
    model, batch = sparse_llava().train(), image_batch(num_padding=2)
    expected = model(**batch, labels=labels_of(batch)).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=labels_of(batch)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1)


def test_image_tokens_have_to_match_the_features():
    model, batch = sparse_llava(), image_batch()
    batch["input_ids"][0, 0] = 7
    with pytest.raises(ValueError, match="tokens: 7, features"):
        model(**batch)


def test_copies_and_pickles_are_independent():
    model, batch = sparse_llava(router_drop="position"), image_batch(num_padding=2)
    # hooks of transformers, which a forward installs, cannot be pickled
    pickled = pickle.dumps(model)
    with torch.no_grad():
        expected = model(**batch).logits
        for other in (copy.deepcopy(model), pickle.loads(pickled)):
            assert torch.equal(other(**batch).logits, expected)
            other.model.language_model.layers[0].mlp.experts.down_proj.zero_()
        assert torch.equal(model(**batch).logits, expected)


def test_embeddings_resize():
    model = sparse_llava()
    model.resize_token_embeddings(72)
    assert model(**image_batch()).logits.shape[-1] == 72


@pytest.mark.parametrize(
    ("backbone", "use_residual"),
    [*((backbone, False) for backbone in BACKBONES), ("llama", True), ("phi", True), ("nemotron", True)],
    ids=lambda value: {True: "residual", False: "plain"}.get(value, value),
)
def test_parallel_plans_name_parameters_that_exist(backbone, use_residual):
    model = sparse_llava(backbone, moe_layers="all", use_residual=use_residual)
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    names = {name.replace("layers.0.", "layers.*.") for name in names}
    text = "model.language_model.layers.*."
    for plan in (model._tp_plan, model._ep_plan):
        own = {name for name in plan if name.startswith(f"{text}mlp.experts") or ".residual_mlp" in name}
        assert own <= names
    experts = model.model.language_model.layers[0].mlp.experts
    split = {name.rpartition(".")[2] for name in model._tp_plan if ".experts." in name}
    parameters = {name for name, _ in experts.named_parameters()}
    assert split == (
        parameters if model._tp_plan and not experts.has_bias and f"{text}self_attn" in str(model._tp_plan) else set()
    )
    if model._ep_plan:
        assert {name.rpartition(".")[2] for name in model._ep_plan if ".experts." in name} == parameters


def test_layers_are_not_split_over_devices():
    assert "LlamaDecoderLayer" in sparse_llava()._no_split_modules


@pytest.mark.slow
def test_compiled_model_equals_eager_model():
    model, batch = sparse_llava(), image_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sft_trainer_of_trl_finds_the_auxiliary_loss(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": list(range(5, 17))} for _ in range(8)])
    gates = []
    for coef in (0.0, 100.0):
        model = sparse_llava(router_aux_loss_coef=coef)
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        tokenizer = tiny_processor().tokenizer
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        assert any("aux_loss" in entry for entry in trainer.state.log_history) == (coef > 0)
        gates.append(model.model.language_model.layers[0].mlp.gate.weight.detach())
    assert not torch.equal(*gates)
