"""Padding takes no place of a limited capacity: its mask reaches every router, whatever calls the layers and how."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models.tiny_llava import BACKBONES, IMAGE_TOKEN, image_batch, labels_of, tiny_llava
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.models.moe_llava import modeling_moe_llava
from peft_moe.models.moe_llava.router import MoeLlavaTopKRouter


def dropping_llava(backbone: str = "llama", **fields) -> MoeLlavaForConditionalGeneration:
    """Every layer a mixture whose experts accept half of what an even spread needs."""
    fields = {
        "moe_layers": "all",
        "expert_noise": 1.0,
        "router_drop": "position",
        "router_capacity_factor": 0.5,
        "router_eval_capacity_factor": 0.5,
        **fields,
    }
    return MoeLlavaForConditionalGeneration.from_dense(tiny_llava(backbone), **fields)


def masks_seen(model) -> list[torch.Tensor | None]:
    """Fills up with what every router is given, call by call."""
    seen = []
    for part in model.modules():
        if isinstance(part, MoeLlavaTopKRouter):
            part.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    return seen


def without_padding(batch: dict) -> dict:
    """The same tokens, all of which count."""
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_mask_reaches_every_router_in_forward_and_in_recomputation(backbone, use_reentrant):
    model, batch = dropping_llava(backbone, router_aux_loss_coef=0.0).train(), image_batch(num_padding=3)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    seen = masks_seen(model)
    outputs = [model(**one, use_cache=False) for one in (batch, without_padding(batch))]
    assert len(seen) == 6
    if use_reentrant is not None:
        # the first pass is recomputed after the second one has left its own mask
        (outputs[0].logits.sum() + outputs[1].logits.sum()).backward()
        assert len(seen) == 12
        seen = seen[:6] + sorted(seen[6:], key=lambda mask: int(mask.sum()))
        seen = seen[:3] + seen[6:9] + seen[3:6] + seen[9:]
    middle = len(seen) // 2
    assert all(torch.equal(mask, batch["attention_mask"].reshape(-1)) for mask in seen[:middle])
    assert all(mask.all() for mask in seen[middle:])


@pytest.mark.parametrize("backbone", ["llama", "stablelm", "nemotron"])
def test_left_padding_changes_no_logits(backbone):
    model, batch = dropping_llava(backbone), image_batch()
    padding = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.cat([padding, batch["attention_mask"]], dim=1)
    padded = {
        **batch,
        "input_ids": torch.cat([padding, batch["input_ids"]], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, 6:], model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_call_without_a_mask_after_one_with_padding_counts_every_token():
    model, batch = dropping_llava(), image_batch(num_padding=3)
    seen = masks_seen(model)
    with torch.no_grad():
        model(**batch)
        model(**{name: value for name, value in batch.items() if name != "attention_mask"})
    assert [mask is None for mask in seen] == [False] * 3 + [True] * 3


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """As `torch.nn.DataParallel` replicates, on one device."""
    replica = module._replicate_for_data_parallel()
    replica._modules = {name: None if part is None else replica_of(part) for name, part in module._modules.items()}
    replica._parameters, replica._buffers = dict(module._parameters), dict(module._buffers)
    return replica


@torch.no_grad()
def logits_with_and_without_padding(model) -> list[torch.Tensor]:
    batch = image_batch(num_padding=3)
    return [model(**one).logits for one in (batch, without_padding(batch))]


def assert_routes_alike(other, model, expected: list[torch.Tensor]) -> None:
    assert not torch.equal(*expected)
    for one, another in zip(logits_with_and_without_padding(other), expected, strict=True):
        assert torch.equal(one, another)
    assert all(layer.mlp._token_mask is None for layer in model.model.language_model.layers)


def test_replicas_take_their_own_mask():
    model = dropping_llava()
    expected = logits_with_and_without_padding(model)
    assert_routes_alike(replica_of(model), model, expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_take_their_own_mask(copy_of):
    model = dropping_llava()
    # hooks of transformers, which a forward installs, cannot be pickled
    other = copy_of(model)
    assert type(other.model.language_model.layers[0]) is type(model.model.language_model.layers[0])
    assert_routes_alike(other, model, logits_with_and_without_padding(model))


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_parts_that_peft_copies_still_see_the_mask(name):
    model, batch = dropping_llava(), image_batch(num_padding=3)
    with torch.no_grad():
        expected = model(**batch).logits
    names = [f"language_model.layers.{index}.{name}" for index in range(3)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["linear_1"], modules_to_save=names)).eval()
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, expected)


def test_layers_keep_the_name_by_which_others_know_them():
    layer = dropping_llava().model.language_model.layers[0]
    assert type(layer).__name__ == "LlamaDecoderLayer" in dropping_llava()._no_split_modules


def test_a_text_model_that_loses_the_mask_is_refused():
    model, batch = dropping_llava(), image_batch(num_padding=3)
    text_model = model.model.language_model
    forward = text_model.forward
    text_model.forward = lambda *args, moe_token_mask=None, **kwargs: forward(*args, **kwargs)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"'moe_token_mask' on to its layers \[0, 1, 2\]"):
        model(**batch)


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_static_cache_routes_as_a_dynamic_one(drop, num_beams):
    batch = image_batch(num_padding=5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    found = []
    for cache in ("dynamic", "static"):
        model = dropping_llava(router_drop=drop)
        masks, weights = masks_seen(model), []
        for layer in model.model.language_model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: weights.append(output[1].clone()))
        sequences = model.generate(**batch, **settings, num_beams=num_beams, cache_implementation=cache)
        found.append((sequences, masks, weights))
    (sequences, masks, weights), (expected, expected_masks, expected_weights) = found
    assert torch.equal(sequences, expected)
    assert int((expected_masks[0] == 0).sum()) == 5 * num_beams
    for one, other in zip(masks, expected_masks, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_losses_of_the_routers_see_the_padding_of_a_static_cache():
    model, batch = dropping_llava(router_drop=None, output_router_logits=True), image_batch(num_padding=3)
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.aux_loss))
    for cache in ("dynamic", "static"):
        model.generate(**batch, max_new_tokens=1, do_sample=False, cache_implementation=cache)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[0], model(**batch, labels=labels_of(batch)).aux_loss, rtol=1e-5, atol=1e-6)


def test_a_mask_that_does_not_name_padding_is_said_and_can_be_made_up_for(monkeypatch):
    model, batch = dropping_llava(), image_batch(num_padding=3)
    said, seen = [], masks_seen(model)
    monkeypatch.setattr(modeling_moe_llava.logger, "warning_once", said.append)
    token_mask, num_tokens = batch["attention_mask"], batch["input_ids"].shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    batch["attention_mask"] = causal & token_mask.bool()[:, None, None, :] | torch.eye(num_tokens, dtype=torch.bool)
    with torch.no_grad():
        model(**batch)
        assert len(said) == 1 and "moe_token_mask" in said[0]
        model(**batch, moe_token_mask=token_mask)
    assert len(said) == 1
    assert seen[:3] == [None] * 3
    assert all(torch.equal(mask, token_mask.reshape(-1)) for mask in seen[3:])
