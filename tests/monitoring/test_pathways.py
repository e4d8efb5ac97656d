"""Pathways equal a count token by token in Python, in every mode; reports and pictures show them."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from monitored import build, check_picture, pathways_in
from peft import get_peft_model

from models import tiny_llava
from models.tiny_llava import IMAGE_TOKEN, image_batch
from peft_moe import MoLEConfig
from peft_moe.forward_context import ForwardContext, ForwardPass
from peft_moe.models import MoeLlavaForConditionalGeneration
from peft_moe.monitoring import (
    ExpertPathways,
    Pathway,
    pathways_report,
    plot_pathways,
    record_expert_load,
    record_pathways,
)
from peft_moe.monitoring.pathways import distinct_rows
from peft_moe.routing import RouterOutput, TopKRouter
from peft_moe.routing_recorder import RoutingRecorder, get_recorder
from tiny_models import tiny_llama, token_batch


NUM_LAYERS = 3


def sparse_llava(**fields) -> MoeLlavaForConditionalGeneration:
    return tiny_llava.sparse_llava(moe_layers="all", **fields)


class HandPaths:
    """Follows every token of every call in Python, by what the routers return to hooks of the test."""

    def __init__(self, model):
        self.layers = []
        self.by_group = {"text": Counter(), "image": Counter(), "all": Counter()}
        for module in model.modules():
            if type(module).__name__ == "MoeLlavaTopKRouter" or isinstance(module, TopKRouter):
                module.register_forward_hook(self._hook)

    def _hook(self, module, args, output):
        index = output.top_k_index if hasattr(output, "top_k_index") else output[2]
        self.layers.append(index.tolist())

    def read(self, input_ids, attention_mask=None, *, choice="top_1"):
        """Count the tokens of the latest call."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for token, (token_id, is_real) in enumerate(
            zip(input_ids.flatten().tolist(), mask.flatten().tolist(), strict=True)
        ):
            if is_real:
                chosen = [layer[token] for layer in self.layers]
                path = tuple((c[0],) if choice == "top_1" else tuple(sorted(c)) for c in chosen)
                self.by_group["image" if token_id == IMAGE_TOKEN else "text"][path] += 1
                self.by_group["all"][path] += 1
        self.layers.clear()


def counter_of(pathways: ExpertPathways, token_group: str | None = None) -> Counter:
    return Counter({entry.experts: entry.num_tokens for entry in pathways.top(10**6, token_group=token_group)})


@pytest.mark.parametrize("choice", ["top_1", "top_k"])
@pytest.mark.parametrize("num_padding", [0, 3], ids=["full", "padded"])
def test_counts_equal_those_of_following_each_token(choice, num_padding):
    model = sparse_llava()
    hand = HandPaths(model)
    with torch.no_grad(), record_pathways(model, choice=choice) as pathways:
        for seed in (1, 2):
            batch = image_batch(num_padding=num_padding, seed=seed)
            model(**batch)
            hand.read(batch["input_ids"], batch["attention_mask"], choice=choice)
    for group in ("text", "image"):
        assert counter_of(pathways, group) == hand.by_group[group]
    assert counter_of(pathways) == hand.by_group["all"]
    assert pathways.token_groups == ["text", "image"]


def test_shares_and_independence_equal_their_definition():
    pathways = pathways_in(sparse_llava(), *(image_batch(seed=seed) for seed in range(4)))
    paths = counter_of(pathways, "text")
    total = sum(paths.values())
    layers = [Counter() for _ in range(NUM_LAYERS)]
    for path, number in paths.items():
        for layer, chosen in zip(layers, path, strict=True):
            layer[chosen] += number
    for entry in pathways.top(5, token_group="text"):
        expected = math.prod(layer[chosen] / total for layer, chosen in zip(layers, entry.experts, strict=True))
        assert entry.share == paths[entry.experts] / total
        assert entry.independent_share == pytest.approx(expected)
        assert entry.lift == pytest.approx(entry.share / expected)
    products = sorted(
        (math.prod(way) for way in itertools.product(*(layer.values() for layer in layers))), reverse=True
    )
    summary = pathways.summary(5, token_group="text")
    assert summary["num_pathways"] == len(paths)
    assert summary["top_share"] == sum(number for _, number in paths.most_common(5)) / total
    assert summary["independent_top_share"] == pytest.approx(sum(products[:5]) / total**NUM_LAYERS)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_generation_counts_each_token_of_each_pass(use_cache):
    model = sparse_llava()
    batch = image_batch(num_padding=2)
    hand, seen = HandPaths(model), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"], kwargs["attention_mask"])), with_kwargs=True
    )
    model.register_forward_hook(
        lambda module, args, output: hand.read(seen[-1][0], seen[-1][1][:, -seen[-1][0].shape[1] :])
    )
    with record_pathways(model) as pathways:
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
    assert counter_of(pathways) == hand.by_group["all"]
    num_prompt = int(batch["attention_mask"].sum())
    expected = num_prompt + 2 * 3 if use_cache else 4 * num_prompt + 2 * (1 + 2 + 3)
    assert pathways.summary()["num_tokens"] == expected
    assert pathways.summary(token_group="image")["num_tokens"] == 8 * (1 if use_cache else 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_two_passes_add_up_whoever_adds_them(mode):
    model = sparse_llava()
    parts = []
    for seed in (1, 2):
        with mode(), record_pathways(model) as part:
            model(**image_batch(seed=seed))
        parts.append(part)
    with mode(), record_pathways(model) as both:
        model(**image_batch(seed=1))
    with torch.no_grad(), record_pathways(model, into=both):
        model(**image_batch(seed=2))
    total = parts[0] + parts[1]
    for group in (None, "text", "image"):
        assert counter_of(both, group) == counter_of(total, group) == counter_of(total.all_reduce(), group)
    assert counter_of(total) == counter_of(parts[0]) + counter_of(parts[1])


def test_all_reduce_adds_what_every_process_has_seen(monkeypatch):
    model = sparse_llava()
    with torch.no_grad(), record_pathways(model) as mine, record_pathways(model, choice="top_1") as other:
        model(**image_batch())
    other.add_pass(made_up(torch.tensor([[0, 1], [2, 3]]), 4))  # a stack that this process never saw

    def gather(value):
        gathered.append(json.loads(json.dumps(value)))
        return gathered

    gathered: list = []
    monkeypatch.setattr("peft_moe.monitoring.pathways.gather_json", gather)
    other.all_reduce()
    total = mine.all_reduce()
    assert set(total.stacks) == {"model.language_model.layers", "layers"}
    for group in ("text", "image"):
        both = total.top(100, token_group=group, stack="model.language_model.layers")
        assert {e.experts: e.num_tokens for e in both} == {k: 2 * n for k, n in counter_of(mine, group).items()}
    assert total.summary(stack="layers")["num_tokens"] == 2


def test_blocks_of_recording_nest():
    model = sparse_llava()
    batch = image_batch()
    with torch.no_grad(), record_expert_load(model) as load, record_pathways(model, choice="top_k") as outer:
        with record_pathways(model) as inner:
            model(**batch)
        model(**batch)
    assert outer.summary()["num_tokens"] == 2 * inner.summary()["num_tokens"] == 2 * batch["input_ids"].numel()
    assert outer.expert_load().split("token_group") == load.split("token_group")
    assert get_recorder(model) is None


def test_the_load_of_top_1_is_the_best_expert_of_each_token():
    model = sparse_llava()
    hand = HandPaths(model)
    batch = image_batch()
    pathways = pathways_in(model, batch)
    best = [Counter(choices[0] for choices in layer) for layer in hand.layers]
    found = pathways.expert_load().by_router()
    assert list(found) == [f"model.language_model.layers.{index}.mlp" for index in range(NUM_LAYERS)]
    assert list(found.values()) == [[layer[expert] for expert in range(4)] for layer in best]


@pytest.mark.parametrize("choice", ["top_1", "top_k"])
def test_pathways_survive_json(choice):
    pathways = pathways_in(sparse_llava(), image_batch(num_padding=2), choice=choice)
    table = json.loads(json.dumps(pathways.to_dict()))
    again = ExpertPathways.from_dict(table)
    assert again.to_dict() == table
    assert again.top(5, token_group="image") == pathways.top(5, token_group="image")
    assert counter_of(again + pathways) == counter_of(pathways) + counter_of(pathways)


@pytest.mark.parametrize(
    ("settings", "num_experts"),
    [({"top_k": 2}, [4, 4, 4]), ({"num_experts_pattern": {r"0\.mlp\.\w+": 2, r"1\.mlp\.\w+": 8}}, [2, 8, 4])],
    ids=["top-2", "different-numbers"],
)
def test_mole_on_a_text_model_has_one_group_and_one_path_per_token(settings, num_experts):
    model = build(**settings).eval()
    hand = HandPaths(model)
    batch = token_batch()
    pathways = pathways_in(model, batch)
    hand.read(batch["input_ids"], batch["attention_mask"])
    assert pathways.token_groups == ["all"]
    assert list(pathways.stacks) == ["model.layers"]
    assert counter_of(pathways) == hand.by_group["all"]
    assert [len(counts) for counts in pathways.expert_load().by_router().values()] == num_experts


def test_adapters_and_towers_are_stacks_of_their_own():
    target = r".*mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)"
    model = get_peft_model(tiny_llava.tiny_llava(), MoLEConfig(target_modules=target, num_experts=4)).eval()
    model.add_adapter("other", MoLEConfig(target_modules=target, num_experts=2))
    batch = image_batch()
    with torch.no_grad(), record_pathways(model) as pathways:
        model(**batch)
        model.set_adapter("other")
        model(**batch)
    towers = ["model.vision_tower.encoder.layers", "model.language_model.layers"]
    assert list(pathways.stacks) == [f"{adapter}.{tower}" for adapter in ("default", "other") for tower in towers]
    with pytest.raises(ValueError, match=r"choose one by stack=, of \['default.model.vision_tower"):
        pathways.top()
    text = pathways.top(1, token_group="text", stack="other.model.language_model.layers")
    assert len(text[0].experts) == 3
    assert pathways.summary(stack="default.model.vision_tower.encoder.layers")["num_tokens"] == 2 * 5
    with pytest.raises(ValueError, match="no stack 'encoder'"):
        pathways.top(stack="encoder")


def made_up(rows: torch.Tensor, num_experts: int) -> ForwardPass:
    """A pass in which layer l sent token t to `rows[t, l]`."""

    recorder = RoutingRecorder(ForwardContext())
    recorder.listeners.append(print)
    recorder.context.begin({})
    logits = torch.zeros(rows.shape[0], num_experts)
    for layer in range(rows.shape[1]):
        output = RouterOutput(logits, rows[:, [layer]], None)
        recorder.record("base", f"layers.{layer}.mlp", output, shape=rows.shape[:1], is_training=False)
    return recorder.context.current


def test_48_layers_of_64_experts_do_not_overflow():
    """64^48 paths: two that differ in the first layer only, and two that differ in the last only, stay apart."""
    base = torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    base[1, 0] = (base[0, 0] + 1) % 64
    base[2, -1] = (base[0, -1] + 1) % 64
    pathways = ExpertPathways()
    pathways.add_pass(made_up(base, 64))
    pathways.add_pass(made_up(base[:2], 64))
    assert sorted(counter_of(pathways).values()) == [1, 2, 4]
    assert pathways.top(1)[0].experts == tuple((expert,) for expert in base[0].tolist())


def test_many_passes_are_merged_in_between(monkeypatch):
    monkeypatch.setattr("peft_moe.monitoring.pathways.MAX_PENDING", 8)
    generator = torch.Generator().manual_seed(0)
    pathways, expected = ExpertPathways(), Counter()
    for _ in range(20):
        rows = torch.randint(0, 3, (11, 4), generator=generator)
        pathways.add_pass(made_up(rows, 3))
        expected.update(tuple((expert,) for expert in row) for row in rows.tolist())
    assert counter_of(pathways) == expected


def test_distinct_rows_agree_with_torch():
    rows = torch.randint(0, 3, (500, 5), generator=torch.Generator().manual_seed(0))
    expected, counts = torch.unique(rows, dim=0, return_counts=True)
    for size in (3, 2**40):  # the second one needs ranks after every column
        found, found_counts = distinct_rows(rows, [size] * 5)
        assert torch.equal(found, expected)
        assert torch.equal(found_counts, counts)


def test_lift_of_a_path_that_is_too_rare_for_a_float():
    rare = Pathway(((0,),), 1, 1e-6, 0.0)
    assert (rare.lift, rare.lift_label) == (math.inf, ">1000")


def test_another_model_in_the_same_pathways_is_refused():
    with torch.no_grad(), record_pathways(sparse_llava()) as pathways:
        pass
    model = sparse_llava()
    with torch.no_grad(), record_pathways(model, into=pathways):
        model(**image_batch())
    other = sparse_llava(num_experts=2)
    with pytest.raises(ValueError, match=r"had \[4, 4, 4\] experts .* now it is \[2, 2, 2\]"):
        with torch.no_grad(), record_pathways(other, into=pathways):
            other(**image_batch())
    assert get_recorder(other) is None


@pytest.mark.parametrize("use", [ExpertPathways.top, ExpertPathways.summary, pathways_report, plot_pathways])
def test_nothing_counted_is_an_error(use):
    with pytest.raises(ValueError, match="no forward pass was counted"):
        use(ExpertPathways())


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"one of the choices \('top_1', 'top_k'\), but found 'best'"):
        ExpertPathways(choice="best")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router"), record_pathways(tiny_llama()):
        pass
    with pytest.raises(ValueError, match="its format is None"):
        ExpertPathways.from_dict({"counts": {}})
    with pytest.raises(ValueError, match="'top_1' cannot be added to those of 'top_k'|'top_k' cannot be added"):
        pathways = ExpertPathways(choice="top_k")
        pathways.add_pass(made_up(torch.zeros(2, 2, dtype=torch.long), 4))
        ExpertPathways() + pathways
    model = build().eval()
    pathways = pathways_in(model, token_batch())
    with pytest.raises(ValueError, match=r"group 'image' was counted in 'model.layers'. Choose one of \['all'\]"):
        pathways.top(token_group="image")


@pytest.fixture(scope="module")
def recorded() -> ExpertPathways:
    return pathways_in(sparse_llava(), image_batch())


def test_report_shows_each_group(recorded):
    report = pathways_report(recorded, n=3)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert lines[2][:2] == ["text", "14"]
    assert lines[3][:2] == ["image", "8"]
    for group in ("text", "image"):
        best = recorded.top(1, token_group=group)[0]
        row = ["1", best.label, str(best.num_tokens), f"{best.share:.2%}", f"{best.independent_share:.2%}"]
        assert [*row, best.lift_label] in lines
        assert f"Pathways of **{group}** tokens through model.language_model.layers (0, 1, 2)" in report


@pytest.mark.parametrize("choice", ["top_1", "top_k"])
def test_png_shows_the_experts_of_each_path(tmp_path, choice):
    pytest.importorskip("matplotlib")
    pathways = pathways_in(sparse_llava(), image_batch(), choice=choice)
    figure = plot_pathways(pathways, tmp_path / "pathways.png", n=4)
    grids = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in grids] == ["text tokens", "image tokens"]
    for axis, group in zip(grids, ("text", "image"), strict=True):
        found = pathways.top(4, token_group=group)
        shown = [text.get_text() for text in axis.texts]
        assert shown == ["+".join(map(str, experts)) for entry in found for experts in entry.experts]
    bars = [axis for axis in figure.axes if not axis.images]
    widths = [bar.get_width() for bar in bars[0].patches]
    assert widths == pytest.approx([100 * entry.share for entry in pathways.top(4, token_group="text")])
    check_picture(tmp_path / "pathways.png")
