"""Decisions of a base model's own routers are recorded as its experts receive them, and nothing stays behind."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from models.tiny_llava import image_batch, labels_of, tiny_llava
from peft_moe import MoeTuningStage, MoExtendConfig, MoLEConfig
from peft_moe.foreign_moe import BASE, RouterRecording, find_moe_blocks, listen_to_routers
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.monitoring import ExpertLoad, record_expert_load
from peft_moe.routing_recorder import get_recorder, records_of
from tiny_models import tiny_llama
from tiny_moe import BY_NAME, FAMILIES, NUM_EXPERTS, MoeFamily, moe_batch


TEXT_ATTENTION = r".*language_model.*self_attn\.(q|k|v|o)_proj"
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=[pytest.mark.slow, pytest.mark.exhaustive] if f.is_further else [])
        for f in FAMILIES
    ],
)


def sparse_llava(**fields) -> MoeLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), **{"expert_noise": 1.0, **fields}).eval()


class AtTheExperts:
    """What the experts of each block are called with: `calls[layer]`, one `(T, K)` list per call."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[int, list[list[list[int]]]] = {}
        for name, module in model.named_modules():
            if "experts" in name.split(".") and any(p.dim() == 3 for p in module.parameters(recurse=False)):
                layer = next(int(part) for part in name.split(".") if part.isdecimal())
                module.register_forward_pre_hook(self._hook(self.calls.setdefault(layer, [])), with_kwargs=True)

    @staticmethod
    def _hook(calls):
        def hook(module, args, kwargs):
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            (index,) = [value for value in values if not value.is_floating_point() and value.dim() > 1]
            calls.append(index.reshape(-1, index.shape[-1]).tolist())

        return hook

    def counts(self, masks: list[torch.Tensor]) -> list[list[int]]:
        """Counts of each layer, given the padding mask of each call."""
        tables = []
        for calls in self.calls.values():
            assert len(calls) == len(masks)
            table = [0] * NUM_EXPERTS
            for call, mask in zip(calls, masks, strict=True):
                for chosen, is_real in zip(call, mask.flatten().tolist(), strict=True):
                    for expert in chosen if is_real else ():
                        table[expert] += 1
            tables.append(table)
        return tables


def counts_of(load: ExpertLoad) -> list[list[int]]:
    return list(load.by_router(adapter=BASE).values())


def hooks_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, of which the second has 4 of padding."""
    batch = moe_batch(num_tokens=12)
    del batch["labels"]
    padding = slice(0, 4) if side == "left" else slice(8, 12)
    batch["attention_mask"][1, padding] = 0
    batch["input_ids"][1, padding] = 0
    return batch


@every_family
def test_counts_equal_what_the_experts_receive(family: MoeFamily):
    model = family.build()
    hand = AtTheExperts(model)
    batch = moe_batch()
    with torch.no_grad(), record_expert_load(model) as load:
        model(**batch)
    assert load.adapters == [BASE]
    assert tuple(hand.calls) == family.moe_layers
    assert counts_of(load) == hand.counts([batch["attention_mask"]])
    assert [sum(counts) for counts in counts_of(load)] == [2 * batch["input_ids"].numel()] * len(family.moe_layers)


@every_family
def test_recording_changes_no_bit_and_leaves_nothing(family: MoeFamily):
    model = family.build()
    batch = moe_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        before, rng = hooks_of(model), torch.get_rng_state()
        with record_expert_load(model):
            found = model(**batch).logits
        after = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=family.noise)
    torch.testing.assert_close(after, expected, rtol=0, atol=family.noise)
    assert hooks_of(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert get_recorder(model) is None


@every_family
def test_choices_come_best_first(family: MoeFamily):
    model = family.build()
    logits, routes = {}, {}

    def keep(module, args, output, block):
        scores = [entry for entry in output if isinstance(entry, torch.Tensor) and entry.is_floating_point()]
        logits[block] = next(e for e in scores if e.shape[-1] == NUM_EXPERTS).reshape(-1, NUM_EXPERTS)

    for block in find_moe_blocks(model)[0].values():
        model.get_submodule(block.router).register_forward_hook(partial(keep, block=block.name))
    with torch.no_grad():
        with listen_to_routers(model, lambda forward_pass: routes.update(records_of(forward_pass)[BASE])):
            model(**moe_batch())
    for name, route in routes.items():
        chosen = logits[name].gather(-1, route.top_k_index)
        assert (chosen[:, :-1] >= chosen[:, 1:]).all(), name


def test_choices_that_a_router_returns_worst_first_are_turned_round():
    model = BY_NAME["mixtral"].build()
    found = []
    for is_turned in (False, True):
        for layer in model.model.layers if is_turned else ():
            layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1].flip(-1), out[2].flip(-1)))
        with (
            torch.no_grad(),
            listen_to_routers(model, lambda forward_pass: found.append(records_of(forward_pass)[BASE])),
        ):
            model(**moe_batch())
    # experts add up in another order, so that only the first layer is sure to see the same numbers
    first, turned = (routes["model.layers.0.mlp"].top_k_index for routes in found)
    assert torch.equal(first, turned)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "moe_llava"])
def test_padding_does_not_count(name, side):
    model = sparse_llava(moe_layers="all") if name == "moe_llava" else BY_NAME[name].build()
    hand = AtTheExperts(model)
    batch = padded(side)
    with torch.no_grad(), record_expert_load(model) as load:
        model(**batch)
    assert counts_of(load) == hand.counts([batch["attention_mask"]])
    assert [sum(counts) for counts in counts_of(load)] == [2 * 20] * 3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_generation_counts_every_pass(use_cache):
    model = BY_NAME["mixtral"].build()
    hand = AtTheExperts(model)
    batch = padded("left")
    with record_expert_load(model) as load:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
        model.generate(**batch, **settings)
    longer = [torch.cat([batch["attention_mask"], torch.ones(2, new)], 1) for new in range(4)]
    masks = [longer[0], *[torch.ones(2, 1)] * 3] if use_cache else longer
    assert counts_of(load) == hand.counts(masks)


def test_beams_are_counted_as_what_they_compute():
    model = BY_NAME["mixtral"].build()
    batch = moe_batch(1, 6)
    with record_expert_load(model) as load:
        model.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3, num_beams=2, do_sample=False)
    assert [sum(counts) for counts in counts_of(load)] == [2 * 2 * (6 + 2)] * 3


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "moe_llava"])
def test_training_counts_once_and_changes_no_gradient(name, use_reentrant):
    def make():
        if name == "moe_llava":
            # the model refuses reentrant checkpointing while its routers are balanced
            return sparse_llava(router_aux_loss_coef=0.0, moe_layers="all")
        return BY_NAME[name].build().requires_grad_(True)

    batch = moe_batch() if name != "moe_llava" else image_batch()
    batch.setdefault("labels", labels_of(batch) if name == "moe_llava" else None)
    plain = make().train()
    hand = AtTheExperts(plain)
    plain(**batch).loss.backward()
    model = make().train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    with record_expert_load(model) as load:
        model(**batch).loss.backward()
    assert counts_of(load) == hand.counts([batch["attention_mask"]])
    expected = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, msg=key)
    assert get_recorder(model) is None


def test_recordings_nest_and_the_last_one_cleans_up():
    model = BY_NAME["mixtral"].build()
    before = hooks_of(model)
    with torch.no_grad():
        outer = RouterRecording(model)
        with record_expert_load(model) as first:
            model(**moe_batch())
            with record_expert_load(model) as second:
                model(**moe_batch())
            model(**moe_batch())
        assert get_recorder(model) is outer.recorder
        with record_expert_load(model) as third:
            model(**moe_batch())
        outer.close()
        outer.close()
    assert get_recorder(model) is None
    assert hooks_of(model) == before
    once = counts_of(second)
    assert counts_of(third) == once
    assert counts_of(first) == [[3 * count for count in counts] for counts in once]


def test_recordings_may_end_in_another_order():
    model = BY_NAME["mixtral"].build()
    first, second = RouterRecording(model), RouterRecording(model)
    first.close()
    with torch.no_grad(), record_expert_load(model) as load:
        model(**moe_batch())
    assert sum(map(sum, counts_of(load))) == 3 * 2 * 16
    second.close()
    assert get_recorder(model) is None


def test_nobody_listening_costs_nothing():
    model = BY_NAME["mixtral"].build()
    recording = RouterRecording(model)
    with torch.no_grad():
        model(**moe_batch())
    assert recording.recorder.context.latest is None
    recording.close()


@pytest.mark.parametrize("where", ["inside", "around"])
def test_an_error_in_forward_leaves_nothing(where):
    model = BY_NAME["mixtral"].build()
    before = hooks_of(model)
    load = ExpertLoad()
    with pytest.raises(IndexError), record_expert_load(model, into=load):
        if where == "inside":
            model(input_ids=torch.tensor([[10_000]]))
        raise IndexError
    assert hooks_of(model) == before
    assert get_recorder(model) is None
    assert load.counts == {}


def test_a_pass_that_fails_in_the_middle_is_not_counted():
    model = BY_NAME["mixtral"].build()

    def fail(module, args):
        raise RuntimeError("in layer 2")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with torch.no_grad(), record_expert_load(model) as load:
        with pytest.raises(RuntimeError, match="in layer 2"):
            model(**moe_batch())
        handle.remove()
        model(**moe_batch())
    assert [sum(counts) for counts in counts_of(load)] == [2 * 16] * 3


def test_hooks_of_others_on_a_router_see_real_calls_only():
    model = BY_NAME["mixtral"].build()
    seen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    with torch.no_grad(), record_expert_load(model):
        model(**moe_batch())
    assert seen == [16]


def test_lora_around_a_mixture_is_seen_through():
    model = get_peft_model(BY_NAME["mixtral"].build(), LoraConfig(r=2, target_modules=["q_proj"]))
    hand = AtTheExperts(model)
    with torch.no_grad(), record_expert_load(model) as load:
        model(**moe_batch())
    assert counts_of(load) == hand.counts([torch.ones(2, 8)])
    assert list(load.by_router()) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert get_recorder(model) is None


def test_lora_on_the_experts_themselves_is_seen_through():
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    hand = AtTheExperts(model)
    with torch.no_grad(), record_expert_load(model) as load:
        model(**moe_batch())
    assert counts_of(load) == hand.counts([torch.ones(2, 8)])


@pytest.mark.parametrize("names", [["gate", "experts"], ["gate"], ["experts"], ["mlp"]], ids="+".join)
def test_copies_in_modules_to_save_are_recorded_while_they_are_active(names):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    model = get_peft_model(BY_NAME["mixtral"].build(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".modules_to_save." in key and key.endswith("weight") and "gate" in key:
                parameter.normal_(generator=generator)
    batch = moe_batch()
    for context in (nullcontext, model.disable_adapter):
        hand = AtTheExperts(model)
        with torch.no_grad(), context(), record_expert_load(model) as load:
            model(**batch)
        assert list(load.by_router()) == [f"model.layers.{layer}.mlp" for layer in range(3)]
        assert counts_of(load) == hand.counts([batch["attention_mask"]])


def test_the_documented_adapter_for_stage_three_is_recorded():
    model = sparse_llava()
    names = MoeTuningStage("III").modules_to_save(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TEXT_ATTENTION, modules_to_save=names)).eval()
    hand = AtTheExperts(model)
    batch = image_batch(num_padding=2)
    with torch.no_grad(), record_expert_load(model) as load:
        model(**batch)
    assert counts_of(load) == hand.counts([batch["attention_mask"]])
    assert load.token_groups == ["text", "image"]


def test_mole_on_the_attention_stands_beside_the_base():
    model = sparse_llava()
    hand = AtTheExperts(model)
    model = get_peft_model(model, MoLEConfig(r=2, num_experts=3, top_k=1, target_modules=TEXT_ATTENTION)).eval()
    batch = image_batch(num_padding=2)
    recorder = get_recorder(model)
    with torch.no_grad(), record_expert_load(model) as load:
        model(**batch)
    assert set(load.adapters) == {"default", BASE}
    assert counts_of(load) == hand.counts([batch["attention_mask"]])
    num_tokens = int(batch["attention_mask"].sum())
    assert {sum(counts) for counts in load.by_router(adapter="default").values()} == {num_tokens}
    assert {len(counts) for counts in load.by_router(adapter="default").values()} == {3}
    assert get_recorder(model) is recorder
    assert recorder.listeners == []


def test_extended_layers_belong_to_the_adapter_and_the_others_to_the_base():
    family = BY_NAME["mixtral"]
    config = MoExtendConfig(layers=[1], copy_sources={1: 0}, router_aux_loss_coef=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(family.build(), config).eval()
    with torch.no_grad(), record_expert_load(model) as load:
        model(**moe_batch())
    assert list(load.by_router(adapter="default")) == ["model.layers.1.mlp"]
    assert list(load.by_router(adapter=BASE)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert len(load.by_router(adapter="default")["model.layers.1.mlp"]) == NUM_EXPERTS + 1
    with torch.no_grad(), model.disable_adapter(), record_expert_load(model) as without:
        model(**moe_batch())
    base = family.build()
    with torch.no_grad(), record_expert_load(base) as expected:
        base(**moe_batch())
    assert without.adapters == [BASE]
    assert without.by_router() == expected.by_router()


def test_a_tuner_that_is_added_in_between_keeps_the_recorder():
    model = BY_NAME["mixtral"].build()
    with record_expert_load(model):
        adapted = get_peft_model(model, MoLEConfig(target_modules=["q_proj", "v_proj"], router_scope="module"))
    assert get_recorder(adapted) is not None
    with torch.no_grad(), record_expert_load(adapted) as load:
        adapted(**moe_batch())
    assert set(load.adapters) == {"default", BASE}


def test_a_model_in_recording_can_be_copied_and_pickled():
    model = BY_NAME["mixtral"].build()
    with torch.no_grad(), record_expert_load(model) as load:
        expected = model(**moe_batch()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**moe_batch()).logits, expected)
    assert [sum(counts) for counts in counts_of(load)] == [2 * 16] * 3


def test_a_model_without_mixture_is_named():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router that peft_moe knows"):
        RouterRecording(tiny_llama())


def test_a_mixture_that_is_not_known_is_named_with_the_reason():
    model = BY_NAME["mixtral"].build()
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' \(ModuleList\) does not keep its experts"):
        RouterRecording(model)
    assert get_recorder(model) is None
