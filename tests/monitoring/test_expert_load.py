"""Counts of `record_expert_load` equal a count by hand in every mode; nothing stays behind; summaries are right."""

from __future__ import annotations

import json
import math

import pytest
import torch
from monitored import HandCount, build, load_in, load_of

from peft_moe.monitoring import ExpertLoad, record_expert_load, summarize_load
from peft_moe.monitoring.summary import load_shares, normalized_entropy, num_dead
from peft_moe.routing_recorder import get_recorder
from tiny_models import tiny_llama, token_batch


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_counts_equal_those_of_hooks_on_the_routers(mode, top_k):
    model = build(top_k=top_k).train(mode == "train")
    hand = HandCount(model)
    batches = [token_batch(), token_batch(3, 9, num_padding=4, seed=5)]
    with record_expert_load(model) as load:
        for batch in batches:
            with torch.inference_mode(mode == "inference_mode"), torch.set_grad_enabled(mode in ("train", "eval")):
                model(**batch)
    expected = hand.counts["train"] or hand.counts["eval"]
    assert load.by_router() == expected
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert [sum(counts) for counts in load.by_router().values()] == [top_k * num_tokens] * 3


def test_a_load_from_inference_mode_can_be_added_to():
    model, batch = build().eval(), token_batch()
    with torch.inference_mode(), record_expert_load(model) as load:
        model(**batch)
    once = load.by_router()
    with record_expert_load(model, into=load):
        model(**batch)
    assert load.by_router() == {name: [2 * count for count in counts] for name, counts in once.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, short = build().eval(), token_batch(num_padding=0)
    padding = torch.zeros(2, 5, dtype=torch.long)
    pair = (padding, 1) if side == "left" else (1, padding)
    join = lambda tensor: torch.cat([tensor if part is not padding else padding for part in pair], 1)  # noqa: E731
    mask = join(short["attention_mask"])
    with torch.no_grad(), record_expert_load(model) as expected:
        model(input_ids=short["input_ids"], attention_mask=short["attention_mask"])
    with torch.no_grad(), record_expert_load(model) as found:
        model(input_ids=join(short["input_ids"]), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert found.by_router() == expected.by_router()


def test_generation_counts_the_prompt_and_each_new_token():
    model = build().eval()
    batch = token_batch(num_padding=0)
    with record_expert_load(model) as load:
        model.generate(batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # 12 tokens of the prompt and 3 of the 4 new ones: nothing reads the last
    assert [sum(counts) for counts in load.by_router().values()] == [2 * (12 + 3)] * 3


def test_domains_fill_one_table():
    model = build().eval()
    load = ExpertLoad.for_model(model)
    for domain, seed in (("chess", 1), ("go", 2)):
        with torch.no_grad(), record_expert_load(model, domain, into=load):
            model(**token_batch(seed=seed))
    assert load.domains == ["chess", "go"]
    both = load.by_router()
    for router, counts in load.by_router(domain="chess").items():
        rest = load.by_router(domain="go")[router]
        assert [a + b for a, b in zip(counts, rest, strict=True)] == both[router]


def test_nothing_is_left_behind_even_after_an_error():
    model = build().eval()
    recorder = get_recorder(model)
    with pytest.raises(KeyError), record_expert_load(model) as load:
        model(**token_batch())
        raise KeyError
    assert recorder.listeners == []
    before = load.by_router()
    model(**token_batch())
    assert load.by_router() == before


def test_recording_does_not_change_the_output():
    model, batch = build().eval(), token_batch()
    expected = model(**batch).logits
    with record_expert_load(model):
        assert torch.equal(model(**batch).logits, expected)


def test_adapters_are_counted_apart():
    model = build()
    model.add_adapter("other", model.peft_config["default"].__class__(num_experts=2, task_type="CAUSAL_LM"))
    with torch.no_grad(), record_expert_load(model) as load:
        model(**token_batch())
        model.set_adapter("other")
        model(**token_batch())
    assert load.adapters == ["default", "other"]
    assert {len(counts) for counts in load.by_router(adapter="other").values()} == {2}
    assert len(load.by_router()) == 6
    assert load.summary().num_experts == 3 * (4 + 2)


class _CalledTwice(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(self.block(*args, **kwargs))


def test_a_block_that_runs_twice_is_one_router():
    base_model = tiny_llama()
    base_model.model.layers[1].mlp = _CalledTwice(base_model.model.layers[1].mlp)
    model = build(base_model)
    load = load_in(model, token_batch(num_padding=0))
    assert [sum(counts) for counts in load.by_router().values()] == [24, 48, 24]


def test_text_and_image_tokens_are_counted_apart():
    base_model = tiny_llama()
    base_model.config.image_token_id = 5
    model = build(base_model).eval()
    batch = token_batch()
    batch["input_ids"][:, 2:6] = 5
    batch["input_ids"][0, 8] = 5
    is_image = (batch["input_ids"] == 5) & batch["attention_mask"].bool()
    hand = HandCount(model)
    load = load_in(model, batch)
    assert load.token_groups == ["text", "image"]
    assert load.by_router() == hand.counts["eval"]
    for router, counts in load.by_router(token_group="image").items():
        chosen = hand.latest_index[router][is_image.flatten()].flatten()
        assert counts == torch.bincount(chosen, minlength=4).tolist()


def test_image_tokens_that_the_router_cannot_see_are_one_group():
    base_model = tiny_llama()
    base_model.config.image_token_index = 5
    model = build(base_model).eval()
    embeds = base_model.get_input_embeddings()(token_batch()["input_ids"])
    with torch.no_grad(), record_expert_load(model) as load:
        model(inputs_embeds=embeds)
    assert load.token_groups == ["all"]


def test_table_survives_json():
    model = build().eval()
    with torch.no_grad(), record_expert_load(model, "chess") as load:
        model(**token_batch())
    table = json.loads(json.dumps(load.to_dict()))
    again = ExpertLoad.from_dict(table)
    assert again.split() == load.split()
    assert again.to_dict() == load.to_dict()
    assert table["summary"]["chess"]["num_experts"] == 12


def test_foreign_table_is_refused():
    with pytest.raises(ValueError, match="under 'train' and under 'eval'"):
        ExpertLoad.from_dict({"train": {}, "eval": {}})


def test_model_without_routers_is_named_in_the_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router that peft_moe knows"):
        with record_expert_load(tiny_llama()):
            pass


def test_all_reduce_of_one_process_is_a_copy():
    load = load_of({("default", "mlp", "all", "all"): [3, 4]})
    total = load.all_reduce()
    assert total is not load
    assert total.by_router() == {"mlp": [3, 4]}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([7, 7, 7], 1.0, id="balanced"),
        pytest.param([9, 0, 0], 0.0, id="one-expert"),
        pytest.param([5, 5, 0, 0], 0.5, id="half-of-the-experts"),
        pytest.param([4], 1.0, id="only-one"),
        pytest.param([0, 0], math.nan, id="nothing-counted"),
    ],
)
def test_normalized_entropy(counts, expected):
    assert normalized_entropy(counts) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        # E = 4, 4000 choices: balanced is 1000, one percent of it is 10
        ([3980, 10, 10, 0], {}, 1),
        ([3981, 10, 9, 0], {}, 2),
        ([60, 40, 20, 0], {"dead_threshold": 1.0}, 2),
        ([60, 40, 20, 0], {"dead_threshold": 0.0}, 1),
    ],
)
def test_an_expert_below_a_share_of_the_balanced_one_is_dead(counts, options, expected):
    assert num_dead(counts, **options) == expected


def test_shares_of_nothing_are_zero():
    assert load_shares([0, 0]) == [0.0, 0.0]


def test_summary_is_a_mean_over_routers_that_saw_tokens():
    summary = summarize_load({"a": [8, 0], "b": [4, 4], "never_called": [0, 0]})
    assert summary.entropy == pytest.approx(0.5)
    assert (summary.max_share, summary.busiest_router, summary.busiest_expert) == (1.0, "a", 0)
    assert (summary.num_dead_experts, summary.num_experts, summary.dead_fraction) == (1, 4, 0.25)


def test_summary_of_nothing_is_none():
    assert summarize_load({}) is None
    assert summarize_load({"a": [0, 0]}) is None
