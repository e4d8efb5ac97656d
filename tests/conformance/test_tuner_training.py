"""Training and generation work with every tuner, whatever the memory savings, precision and loop."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from tuner_cases import every_tuner, one_case_per_tuner


def routers(case, model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if any(part in name for part in case.float32_parts)}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, kind: str):
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    return model


@every_tuner
@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(case, kind):
    found = []
    for setting in ("none", kind):
        model = checkpointed(case.wrap(), setting).train()
        model(**case.batch()).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


@every_tuner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("keeps_float32", [True, False], ids=["adapter-fp32", "adapter-as-base"])
def test_routers_stay_float32_in_a_half_precision_model(case, dtype, keeps_float32):
    model = case.model().to(dtype)
    torch.manual_seed(7)
    model = get_peft_model(model, case.config(), autocast_adapter_dtype=keeps_float32).train()
    assert all(p.dtype == torch.float32 for p in routers(case, model).values())
    experts = {p.dtype for name, p in model.named_parameters() if p.requires_grad and name not in routers(case, model)}
    assert experts == {torch.float32 if keeps_float32 else dtype}
    output = model(**case.batch())
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    assert all(name in gradients(model) for name in routers(case, model))


@every_tuner
def test_routers_stay_float32_when_the_model_is_cast_and_saved(case, tmp_path):
    model = case.model().to(torch.bfloat16)
    model = get_peft_model(model, case.config(), autocast_adapter_dtype=False).eval()
    expected = case.logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        case.model().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=True
    ).eval()
    assert all(p.dtype == torch.float32 for p in routers(case, loaded).values())
    assert torch.equal(case.logits(loaded), expected)


@every_tuner
def test_autocast_keeps_routers_in_float32_and_trains(case):
    model = case.wrap().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**case.batch())
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in gradients(model).values())


@every_tuner
def test_autocast_is_close_to_full_precision(case):
    model = case.wrap()
    expected = case.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.logits(model).float()
    # bfloat16 keeps 8 bits; a token may change its expert
    assert (found - expected).norm() < 0.1 * expected.norm()


def rows_of(case, num_rows: int = 8) -> list[dict[str, torch.Tensor]]:
    batch = case.batch(num_rows, 10)
    return [{name: value[i] for name, value in batch.items()} for i in range(num_rows)]


def trainer_of(case, folder, **settings) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    rows = rows_of(case)
    return Trainer(case.wrap(), TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows[:4])


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@every_tuner
def test_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(case, tmp_path):
    whole = trainer_of(case, tmp_path / "whole")
    whole.train()
    trainer_of(case, tmp_path / "part", save_strategy="steps", save_steps=3).train()
    resumed = trainer_of(case, tmp_path / "part")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    expected, found = adapter_of(whole.model), adapter_of(resumed.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert resumed.state.global_step == 6


@every_tuner
def test_training_lowers_the_loss_and_touches_no_base_weight(case, tmp_path):
    trainer = trainer_of(case, tmp_path, max_steps=20, learning_rate=3e-2)
    before = trainer.evaluate()["eval_loss"]
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    start = adapter_of(trainer.model)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in base.items())
    assert all(not torch.equal(after[name], p) for name, p in start.items())


@one_case_per_tuner
def test_best_model_is_loaded_at_the_end(case, tmp_path):
    trainer = trainer_of(
        case,
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        learning_rate=3e-2,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == max(losses, key=losses.get)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses.values()), rel=1e-6)


@every_tuner
def test_generation_with_a_cache_equals_generation_without(case):
    model = case.wrap()
    prompt = case.batch(num_padding=0)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    cached, uncached = (
        model.generate(input_ids=prompt, use_cache=use, **settings, **case.for_routers()) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert cached.shape[1] == prompt.shape[1] + 8


@every_tuner
@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}],
    ids=["beams", "sampling"],
)
def test_generation_with_other_strategies(case, settings):
    model = case.wrap()
    prompt = case.batch(num_padding=0)["input_ids"]
    found = model.generate(input_ids=prompt, max_new_tokens=5, eos_token_id=-1, **settings, **case.for_routers())
    assert found.shape == (2 * settings.get("num_return_sequences", 1), prompt.shape[1] + 5)


@every_tuner
def test_left_padding_changes_no_generated_token(case):
    model = case.wrap()
    prompt = case.batch(num_padding=0)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, **case.for_routers()}
    expected = model.generate(input_ids=prompt, **settings)[:, prompt.shape[1] :]
    padded = nn.functional.pad(prompt, (4, 0))
    mask = nn.functional.pad(torch.ones_like(prompt), (4, 0))
    found = model.generate(input_ids=padded, attention_mask=mask, **settings)[:, padded.shape[1] :]
    assert torch.equal(found, expected)


@pytest.mark.slow
@one_case_per_tuner
@pytest.mark.parametrize("kind", ["none", "non_reentrant"])
def test_compiled_model_gives_the_same_loss_and_gradients(case, kind):
    found = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = checkpointed(case.wrap(), kind).train()
        run = torch.compile(model, backend="aot_eager") if is_compiled else model
        loss = run(**case.batch()).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@one_case_per_tuner
def test_compiled_model_is_one_graph(case):
    torch._dynamo.reset()
    model = case.wrap()
    explanation = torch._dynamo.explain(model.get_base_model())(**case.batch(num_padding=0))
    assert explanation.graph_break_count == 0, [str(reason.reason)[:300] for reason in explanation.break_reasons]


@one_case_per_tuner
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "disk"], ids=["cpu", "disk-offload"])
def test_device_map_changes_no_output(case, device_map, tmp_path, monkeypatch):
    if device_map == "disk" and not case.adapts_linears:
        pytest.skip("PEFT does not find Mixtral's experts, which transformers saves under other names; nor with LoRA")
    monkeypatch.chdir(tmp_path)  # PEFT writes its offload index to a relative path
    case.model().save_pretrained(tmp_path / "base")
    adapted = case.wrap()
    adapted.save_pretrained(tmp_path / "adapter")
    base_settings = settings = {"device_map": device_map}
    if device_map == "disk":
        first = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        devices = {**dict.fromkeys(first, "cpu"), "model.layers.2": "disk"}
        base_settings = {"device_map": devices, "offload_folder": str(tmp_path / "offload")}
        devices = {f"base_model.model.{name}": device for name, device in devices.items()}
        settings = {"device_map": devices, "offload_dir": str(tmp_path / "offload")}
    base = type(case.model()).from_pretrained(tmp_path / "base", **base_settings)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", **settings).eval()
    if device_map == "disk":
        assert all(p.is_meta for p in model.get_base_model().model.layers[2].parameters())
    assert torch.equal(case.logits(model), case.logits(adapted))
