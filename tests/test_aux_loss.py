"""The auxiliary loss reaches backward under every loop, with the weight that it should have.

The reference is computed by hand: router logits are captured by hooks in a plain forward pass and put into formulas
written here from the papers. What is compared is the *difference* that the auxiliary loss makes to all gradients.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from aux_by_hand import (
    COEF,
    LOSS_TYPES,
    GradientTrap,
    assert_same,
    aux_by_hand,
    build,
    effect_of_aux_loss,
    expected_gradient,
    gradients,
    label_share,
    outside_loss,
    rows_of,
)
from peft_moe import MoLEConfig, get_aux_loss, set_aux_loss_scale
from tiny_models import tiny_llama, token_batch


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
def test_gradient_equals_the_one_computed_by_hand(loss_type, checkpointing):
    batch = token_batch()

    def run(model):
        if checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        model(**batch).loss.backward()

    found = effect_of_aux_loss(run, router_aux_loss_type=loss_type)
    assert_same(found, expected_gradient([batch], [1.0], loss_type))


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
def test_two_forward_passes_before_one_backward_keep_their_own_state(checkpointing):
    batches = [token_batch(num_padding=5), token_batch(3, 9, num_padding=2, seed=7)]

    def run(model):
        if checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        first, second = (model(**batch).loss for batch in batches)
        (0.25 * first + 0.75 * second).backward()

    found = effect_of_aux_loss(run, router_aux_loss_type="mole")
    assert_same(found, expected_gradient(batches, [0.25, 0.75], "mole"))


def test_loss_value_is_that_of_the_task():
    batch = token_batch()
    assert torch.equal(build()(**batch).loss, build(coef=0.0)(**batch).loss)


def test_scaled_loss_scales_the_auxiliary_loss():
    batch = token_batch()
    found = effect_of_aux_loss(lambda model: (model(**batch).loss * 1024).backward())
    assert_same(found / 1024, expected_gradient([batch], [1.0]))


def test_in_place_scaling_of_the_loss_is_allowed():
    batch = token_batch()

    def run(model):
        loss = model(**batch).loss
        loss *= 3
        loss.backward()

    assert_same(effect_of_aux_loss(run) / 3, expected_gradient([batch], [1.0]))


def test_loss_built_outside_from_logits_has_weight_one():
    batch = token_batch()

    def run(model):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [1.0]))


def test_scale_of_an_outside_loss_can_be_stated():
    batch = token_batch()

    def run(model):
        set_aux_loss_scale(model, 0.125)
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean().backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [0.125]))


def test_custom_loop_may_add_the_auxiliary_loss_itself():
    batch = token_batch()

    def run(model):
        loss = model(**batch).loss
        (loss + 2 * get_aux_loss(model)).backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [2.0]))


def test_logging_the_auxiliary_loss_does_not_switch_it_off():
    batch = token_batch()
    values = []

    def run(model):
        loss = model(**batch).loss
        with torch.no_grad():
            values.append(get_aux_loss(model).item())
        loss.backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [1.0]))
    assert values[0] == pytest.approx(aux_by_hand(build(coef=0.0), batch).item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["switch", pytest.param("mole", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("steps", "arguments", "trainer_arguments"),
    [
        pytest.param(1, {}, {}, id="plain"),
        pytest.param(4, {}, {}, id="accumulation"),
        pytest.param(4, {"gradient_checkpointing": True}, {}, id="accumulation-checkpointing"),
        pytest.param(
            4,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
            id="accumulation-reentrant",
        ),
        pytest.param(4, {"label_smoothing_factor": 0.1}, {}, id="label-smoothing"),
        pytest.param(4, {}, {"compute_loss_func": outside_loss}, id="compute-loss-func"),
        pytest.param(2, {"bf16": True}, {}, id="bf16-autocast"),
    ],
)
def test_trainer_gives_each_micro_batch_its_share(tmp_path, loss_type, steps, arguments, trainer_arguments):
    batches = [token_batch(2, 12, num_padding=2 + 2 * i, seed=i) for i in range(steps)]
    is_bf16 = arguments.get("bf16", False)
    # bf16 rounds the gradient of task and auxiliary loss together: the larger the latter, the less of it is lost
    factor = 10 if is_bf16 else 1
    found = []
    for coef in (factor * COEF, 0.0):
        model = build(coef=coef, router_aux_loss_type=loss_type)
        trainer = GradientTrap(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=steps,
                max_steps=1,
                max_grad_norm=0,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                train_sampling_strategy="sequential",
                **arguments,
            ),
            train_dataset=rows_of(batches),
            **trainer_arguments,
        )
        trainer.train()
        found.append(trainer.trapped)
    difference = found[0] - found[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        expected = factor * expected_gradient(batches, label_share(batches), loss_type)
    if is_bf16:
        assert (difference.norm() / expected.norm()).item() == pytest.approx(1.0, abs=1e-2)
        assert torch.nn.functional.cosine_similarity(difference, expected, dim=0) > 0.999
        return
    assert_same(difference, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    short = token_batch(num_padding=0)
    padding = torch.zeros(2, 5, dtype=torch.long)
    join = (lambda a, b: torch.cat([b, a], 1)) if side == "left" else (lambda a, b: torch.cat([a, b], 1))
    mask = join(short["attention_mask"], padding)
    padded = {
        "input_ids": join(short["input_ids"], padding),
        "attention_mask": mask,
        "labels": join(short["labels"], padding - 100),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    found = effect_of_aux_loss(lambda model: model(**padded).loss.backward())
    expected = effect_of_aux_loss(lambda model: model(**short).loss.backward())
    assert_same(found, expected)


def test_batch_of_padding_adds_nothing_and_no_nan():
    batch = token_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    model = build()
    model(**batch).logits.sum().backward()
    assert torch.isfinite(gradients(model)).all()
    with torch.no_grad():
        assert get_aux_loss(model) == 0


def test_evaluation_and_generation_leave_no_record():
    model = build().eval()
    batch = token_batch()
    model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=3)
    with pytest.raises(RuntimeError, match="no forward pass in training mode"):
        get_aux_loss(model)


def test_switch_loss_of_one_router_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from peft_moe.aux_loss import load_balancing_loss
    from peft_moe.routing_recorder import routing_statistics

    torch.manual_seed(0)
    logits = [torch.randn(20, 4) for _ in range(3)]
    mask = torch.ones(2, 10)
    mask[1, 6:] = 0
    statistics = [routing_statistics(entry, entry.topk(2).indices, mask) for entry in logits]
    expected = load_balancing_loss_func(tuple(logits), 4, 2, mask)
    torch.testing.assert_close(load_balancing_loss(statistics, loss_type="pooled"), expected)
    expected = load_balancing_loss_func(tuple(logits[:1]), 4, 2, mask)
    torch.testing.assert_close(load_balancing_loss(statistics[:1]), expected)


def test_half_precision_autocast_does_not_round_the_auxiliary_loss():
    batch = token_batch(8, 64, num_padding=3)

    def run(model, dtype=torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**batch).loss
        (loss * 1024).backward()

    found = router_gradients(build(coef=COEF, gate_scale="none"), run) / 1024
    expected = router_gradients(build(coef=COEF, gate_scale="none"), lambda model: model(**batch).loss.backward())
    ratio = (found.norm() / expected.norm()).item()
    assert ratio == pytest.approx(1.0, abs=5e-3)


def router_gradients(model, run) -> torch.Tensor:
    run(model)
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "mole_router" in n]).double()


def test_head_that_ignores_num_items_keeps_the_weight_of_its_loss():
    import transformers

    settings = {"num_labels": 2, "pad_token_id": 0}
    config = tiny_llama(**settings).config
    batch = token_batch(2, 12)
    found = []
    for num_items in (None, 8):
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(config)
        adapter = MoLEConfig(num_experts=4, top_k=1, gate_scale="none", lora_dropout=0.0, task_type="SEQ_CLS")
        model = get_peft_model(model, adapter).train()
        extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor([0, 1]),
        }
        found.append(
            router_gradients(model, lambda model, inputs={**inputs, **extra}: model(**inputs).loss.backward())
        )
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
def test_calling_the_backbone_directly_has_weight_one(checkpointing):
    batch = token_batch()
    other = token_batch(3, 9, num_padding=0, seed=5)

    def run(model):
        if checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        (1000 * model(**other).loss).backward()
        model.zero_grad()
        backbone = model.get_base_model().model
        backbone(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state.square().mean().backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [1.0]))


def test_calling_a_part_of_the_model_in_training_warns():
    model = build()
    with pytest.warns(UserWarning, match="auxiliary loss does not act"):
        model.get_base_model().model.layers[0].mlp(torch.randn(1, 4, 32))


def test_listening_does_not_add_an_auxiliary_loss_in_eval_mode():
    from peft_moe import record_expert_load

    batch = token_batch()
    found = []
    for coef in (COEF, 0.0):
        model = build(coef=coef).eval()
        with record_expert_load(model):
            model(**batch).loss.backward()
        found.append(gradients(model))
    assert torch.equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["whole-model", "each-layer"])
@pytest.mark.parametrize("loss", ["inside", "outside"])
def test_compiled_model_has_the_same_auxiliary_loss(scope, loss):
    batch = token_batch()

    def run(model):
        if scope == "each-layer":
            for layer in model.get_base_model().model.layers:
                layer.compile(backend="aot_eager")
        else:
            model.compile(backend="aot_eager")
        if loss == "inside":
            model(**batch).loss.backward()
        else:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logits.square().mean().backward()

    assert_same(effect_of_aux_loss(run), expected_gradient([batch], [1.0]))


def test_soft_mixture_balances_the_best_expert():
    batch = token_batch()
    model = build(soft=True)
    model(**batch).loss.backward()
    with torch.no_grad():
        assert get_aux_loss(model) != pytest.approx(COEF * 4, rel=1e-3)


def test_replicas_of_data_parallel_are_refused():
    model = build()
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="does not support nn.DataParallel"):
        replica(torch.randn(1, 4, 32))


def test_routers_stay_float32_when_the_model_is_cast():
    model = build().to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "mole_router" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "mole_A" in n} == {torch.bfloat16}


def test_copies_of_a_model_record_for_themselves():
    model = build()
    batch = token_batch()
    model(**batch).loss.backward()
    clone = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="no forward pass"):
        get_aux_loss(clone)
    clone(**batch)
    assert get_aux_loss(clone) > 0


def test_model_without_routers_is_named_in_the_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router of peft_moe"):
        get_aux_loss(tiny_llama())


def test_an_interrupted_forward_leaves_no_pass_open():
    model = build().train()
    batch = token_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    layer = model.get_base_model().model.layers[2].mlp.down_proj

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    model(**batch).loss.backward()
    assert_same(gradients(model), expected)
