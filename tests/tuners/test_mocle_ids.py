"""`cluster_ids` reach every layer, by whatever way a batch comes to the model, and only those that make sense."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from peft import PeftModel
from test_mocle_formula import IDS, SETTINGS, build, layers_of
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    DynamicCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_moe import ClusterIdsCollator, MoCLEConfig, record_expert_load
from tiny_architectures import ARCHITECTURES, blip2_config, image_and_text
from tiny_models import tiny_llama, tiny_tokenizer, token_batch


OTHER_IDS = torch.tensor([2, 5])
OF_PROMPTS = torch.tensor([0, 3, 5])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompt(batch_size: int = 3) -> torch.Tensor:
    return token_batch(batch_size, num_padding=0)["input_ids"]


def architecture(name: str):
    (found,) = [entry for entry in ARCHITECTURES if entry.name == name]
    return found


def wrap(model: nn.Module, **settings) -> PeftModel:
    return build(model, **{"task_type": None, **settings})


class TestForward:
    def test_other_ids_give_other_outputs(self):
        model = build()
        assert not torch.equal(
            model(**token_batch(), cluster_ids=IDS).logits, model(**token_batch(), cluster_ids=OTHER_IDS).logits
        )

    def test_every_way_of_calling_gives_the_same(self):
        model = build()
        expected = model(**token_batch(), cluster_ids=IDS).logits
        base = model.get_base_model()
        assert torch.equal(base(**token_batch(), cluster_ids=IDS).logits, expected)
        assert torch.equal(base.forward(**token_batch(), cluster_ids=IDS).logits, expected)
        inputs = {name: token_batch()[name] for name in ("input_ids", "attention_mask")}
        hidden = base.model(**inputs, cluster_ids=IDS).last_hidden_state
        assert torch.equal(base.lm_head(hidden), expected)

    def test_ids_of_any_integer_type_do(self):
        model = build()
        expected = model(**token_batch(), cluster_ids=IDS).logits
        for dtype in (torch.int32, torch.uint8):
            assert torch.equal(model(**token_batch(), cluster_ids=IDS.to(dtype)).logits, expected)

    def test_the_base_model_says_that_it_takes_them(self):
        model = build()
        parameters = inspect.signature(model.get_base_model().forward).parameters
        assert "cluster_ids" in parameters and "input_ids" in parameters
        base = model.unload()
        assert "cluster_ids" not in inspect.signature(base.forward).parameters
        with pytest.raises(ValueError, match="cluster_ids"):
            base.generate(prompt(), cluster_ids=torch.tensor([0, 1, 2]), **GREEDY)

    def test_a_copy_calls_itself_in_generation_too(self):
        model = build()
        expected = model.generate(prompt(), cluster_ids=OF_PROMPTS, **GREEDY)
        clone = copy.deepcopy(model)
        for layer in layers_of(model).values():
            layer.mocle_B["default"].weight.data.zero_()
        assert torch.equal(clone.generate(prompt(), cluster_ids=OF_PROMPTS, **GREEDY), expected)

    def test_an_image_changes_no_routing(self):
        model = wrap(architecture("llava").build())
        names = {layer.name for layer in layers_of(model).values()}
        assert names and all("language_model" in name for name in names)
        routes = []
        for seed in (0, 1):
            batch = image_and_text()
            batch["pixel_values"] = torch.randn_like(batch["pixel_values"]) + seed
            ids = torch.arange(batch["input_ids"].shape[0])
            with record_expert_load(model) as load:
                output = model(**batch, cluster_ids=ids)
            routes.append((load.by_router(), output.logits))
        assert routes[0][0] == routes[1][0]
        assert not torch.equal(routes[0][1], routes[1][1])

    def test_layers_that_see_images_are_refused(self):
        with pytest.raises(
            ValueError, match=r"'model.vision_tower.*' does not belong to the language model.*modules_to_save"
        ):
            wrap(architecture("llava").build(), target_modules=r".*vision_tower.*fc1")

    def test_tokens_that_a_model_flattens_are_cut_by_its_batch_and_by_nothing_else(self):
        model = build()
        layer = next(iter(layers_of(model).values()))
        with (
            layer.recorder.context.surround({"cluster_ids": IDS}),
            pytest.raises(ValueError, match="got a batch of 12"),
        ):
            layer(torch.randn(12, 32))

    def test_a_model_that_pools_a_batch_is_routed_after_pooling_too(self):
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
        model = wrap(base, target_modules=["dense"])
        assert "bert.pooler.dense" in {layer.name for layer in layers_of(model).values()}
        inputs = {name: token_batch()[name] for name in ("input_ids", "attention_mask")}
        together = model(**inputs, cluster_ids=IDS).logits
        alone = model(**{name: value[:1] for name, value in inputs.items()}, cluster_ids=IDS[:1]).logits
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


class TestPacked:
    @pytest.mark.parametrize("num_padding", [0, 3])
    def test_packed_examples_are_routed_one_by_one(self, num_padding):
        model = build(tiny_llama(attn_implementation="eager"))
        rows = [prompt(1), prompt(2)[1:, :7], prompt(3)[2:, :5]]
        packed = nn.functional.pad(torch.cat(rows, dim=1), (0, num_padding))
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])
        positions = nn.functional.pad(positions, (0, num_padding))[None]
        ids = torch.tensor([4, 0, 3])
        routes = []
        for layer in layers_of(model).values():
            layer.register_forward_pre_hook(
                lambda module, args: routes.append(module.dispatch("default", args[0], args[0])[1])
            )
        model(input_ids=packed, position_ids=positions, cluster_ids=ids)
        lengths = torch.tensor([row.shape[1] for row in rows])
        for layer, routed in zip(layers_of(model).values(), routes):
            with layer.recorder.context.surround({"cluster_ids": ids}):
                expected = layer.dispatch("default", torch.zeros(3, 1, 1), torch.zeros(0))[1]
            index = routed.plan.top_k_index[: int(lengths.sum())]
            assert torch.equal(index, expected.plan.example_index.repeat_interleave(lengths, dim=0))
            weights = routed.top_k_weights[: int(lengths.sum())]
            torch.testing.assert_close(weights, expected.top_k_weights.repeat_interleave(lengths, dim=0))

    def test_packed_gradients_are_those_of_single_examples(self):
        model = build()
        layer = next(iter(layers_of(model).values()))
        x, positions = torch.randn(1, 9, 32), torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
        ids = torch.tensor([4, 0, 4])
        parameters = [p for p in layer.parameters() if p.requires_grad]
        with layer.recorder.context.surround({"cluster_ids": ids, "position_ids": positions}):
            found = torch.autograd.grad(layer(x).square().sum(), parameters)
        parts = []
        for start, stop, cluster in ((0, 4, 4), (4, 6, 0), (6, 9, 4)):
            with layer.recorder.context.surround({"cluster_ids": torch.tensor([cluster])}):
                parts.append(torch.autograd.grad(layer(x[:, start:stop]).square().sum(), parameters))
        for gradient, *expected in zip(found, *parts):
            torch.testing.assert_close(gradient, sum(expected), rtol=1e-4, atol=1e-5)

    def test_left_padding_is_no_packing(self):
        batch = token_batch(2, 4, num_padding=0)
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        positions = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
        with pytest.raises(ValueError, match="cluster_ids has 3 entries"):
            build()(batch["input_ids"], mask, position_ids=positions, cluster_ids=torch.tensor([0, 1, 2]))

    def test_packed_rows_are_understood_without_the_hooks_too_and_other_numbers_of_ids_refused(self):
        model = build()
        inputs = {"input_ids": prompt(1)[:, :6], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
        expected = model(**inputs, cluster_ids=OTHER_IDS).logits
        assert torch.equal(model.get_base_model().forward(**inputs, cluster_ids=OTHER_IDS).logits, expected)
        with pytest.raises(ValueError, match="cluster_ids has 3 entries.*packed"):
            model(**inputs, cluster_ids=OF_PROMPTS)


class TestWhatComesBefore:
    """A pass knows its own clusters, whatever happened before it or happens beside it."""

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_an_interrupted_call_leaves_nothing_behind(self, call):
        model = build()
        expected = model(**token_batch(), cluster_ids=OTHER_IDS).logits
        layer = list(layers_of(model).values())[3]

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            if call == "forward":
                model(**token_batch(), cluster_ids=IDS)
            else:
                model.generate(prompt(2), cluster_ids=IDS, **GREEDY)
        hook.remove()
        with pytest.raises(ValueError, match="got no cluster_ids"):
            model(**token_batch())
        assert torch.equal(model(**token_batch(), cluster_ids=OTHER_IDS).logits, expected)
        model.train()(**token_batch(), cluster_ids=OTHER_IDS).loss.backward()

    def test_ids_that_are_changed_in_place_count(self):
        model, ids = build(), IDS.clone()
        with torch.no_grad():
            model(**token_batch(), cluster_ids=ids)
            ids.copy_(OTHER_IDS)
            found = model(**token_batch(), cluster_ids=ids).logits
            assert torch.equal(found, model(**token_batch(), cluster_ids=OTHER_IDS).logits)

    @pytest.mark.parametrize("is_seen", [True, False], ids=["in place", "unseen"])
    def test_weights_that_change_between_two_calls_count(self, is_seen):
        model = build()
        with torch.no_grad():
            before = model(**token_batch(), cluster_ids=IDS).logits
            for layer in layers_of(model).values():
                for gate in layer.mocle_gate.values():
                    if is_seen:
                        gate.weight.mul_(-1)
                    else:
                        gate.weight.data = -gate.weight.data
            after = model(**token_batch(), cluster_ids=IDS).logits
            assert not torch.equal(after, before)
            assert torch.equal(model(**token_batch(), cluster_ids=IDS).logits, after)

    def test_a_cache_that_was_emptied_knows_no_clusters(self):
        model = build(target_modules=["q_proj", "v_proj"])
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt(2), cluster_ids=IDS, past_key_values=cache)
            cache.crop(-cache.get_seq_length())
            assert cache.get_seq_length() == 0
            with pytest.raises(ValueError, match="got no cluster_ids"):
                model(prompt(2), past_key_values=cache)

    def test_a_generation_continues_the_cache_of_an_earlier_one(self):
        model = build()
        settings = {**GREEDY, "return_dict_in_generate": True}
        first = model.generate(prompt(2), cluster_ids=IDS, **settings)
        again = torch.cat([first.sequences, prompt(2)[:, :2]], dim=1)
        continued = model.generate(again, past_key_values=first.past_key_values, **settings).sequences
        assert torch.equal(continued, model.generate(again, cluster_ids=IDS, **settings).sequences)

    def test_a_second_thread_is_refused_and_the_first_one_undisturbed(self):
        import threading

        model, errors = build(), []
        layer = next(iter(layers_of(model).values()))
        expected = model(**token_batch(), cluster_ids=IDS).logits

        def call_beside(*_):
            def other():
                try:
                    model(**token_batch(), cluster_ids=OTHER_IDS)
                except RuntimeError as error:
                    errors.append(str(error))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        hook = layer.register_forward_pre_hook(call_beside)
        assert torch.equal(model(**token_batch(), cluster_ids=IDS).logits, expected)
        hook.remove()
        assert len(errors) == 1 and "Two threads" in errors[0]
        thread = threading.Thread(target=lambda: errors.append(model(**token_batch(), cluster_ids=IDS).logits))
        thread.start()
        thread.join()
        assert torch.equal(errors[1], expected)

    def test_training_with_a_cache_leaves_it_to_the_garbage_collector(self):
        import gc
        import weakref

        model, alive = build().train(), []
        for _ in range(3):
            cache = DynamicCache(config=model.config)
            alive.append(weakref.ref(cache))
            model(**token_batch(), cluster_ids=IDS, past_key_values=cache).loss.backward()
            del cache
        gc.collect()
        assert not any(reference() for reference in alive)

    def test_a_leaf_that_is_handed_through_collects_no_hooks(self):
        model = build().train()
        soft_prompt = nn.Parameter(torch.randn(2, 5, 32))
        for _ in range(3):
            output = model(inputs_embeds=soft_prompt, cluster_ids=IDS, output_hidden_states=True)
            output.logits.sum().backward()
        assert not soft_prompt._backward_hooks


class TestOtherWrappers:
    @pytest.mark.parametrize("hook_comes", ["first", "last"])
    def test_hooks_of_accelerate_come_and_go(self, hook_comes):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        base = tiny_llama()
        if hook_comes == "first":
            add_hook_to_module(base, ModelHook())
        model = build(base)
        expected = model(**token_batch(), cluster_ids=IDS).logits
        if hook_comes == "last":
            add_hook_to_module(base, ModelHook())
            assert "cluster_ids" in inspect.signature(base.forward).parameters
            assert torch.equal(model(**token_batch(), cluster_ids=IDS).logits, expected)
            model.unload()
            remove_hook_from_module(base)
        else:
            remove_hook_from_module(base)
            model.unload()
        plain = base(**token_batch()).logits
        assert torch.equal(plain, tiny_llama()(**token_batch()).logits)
        again = build(base)
        assert torch.equal(again(**token_batch(), cluster_ids=IDS).logits, expected)
        assert again.generate(prompt(2), cluster_ids=IDS, **GREEDY).shape == (2, 18)

    @pytest.mark.parametrize("first", ["mole", "mocle"])
    def test_two_methods_in_one_linear_are_refused(self, first):
        from peft_moe import MoLEConfig

        configs = [MoLEConfig(num_experts=2, lora_target_modules=None), MoCLEConfig(**{**SETTINGS, "task_type": None})]
        if first == "mocle":
            configs.reverse()
        base = tiny_llama()
        base.add_adapter(configs[0], adapter_name="one")
        with pytest.raises(ValueError, match="already: a linear cannot have experts of two methods"):
            base.add_adapter(configs[1], adapter_name="two")


BAD_IDS = {
    "missing": (None, "got no cluster_ids.*attach_encoder"),
    "too few": (torch.tensor([1]), "has 1 entries.*batch of 2"),
    "too many": (torch.tensor([1, 2, 3]), "has 3 entries.*batch of 2"),
    "too large": (torch.tensor([0, 6]), r"between 0 and 5 \(num_clusters=6\), but holds 6"),
    "negative": (torch.tensor([0, -1]), "but holds -1"),
    "float": (torch.tensor([0.0, 1.0]), r"whole numbers, but is torch.float32.*\.long\(\)"),
    "bool": (torch.tensor([True, False]), "whole numbers, but is torch.bool"),
    "a matrix": (torch.tensor([[0], [1]]), r"but is \(2, 1\).*reshape"),
    "empty": (torch.tensor([], dtype=torch.int64), r"but is \(0,\)"),
    "a list": ([0, 1], "must be a tensor, but is list"),
    "elsewhere": (torch.tensor([0, 1], device="meta"), "is on meta, but input_ids on cpu"),
}


@pytest.mark.parametrize(("ids", "message"), BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_bad_ids_are_refused_before_anything_is_computed(ids, message, is_training):
    model = build().train(is_training)
    with pytest.raises(ValueError, match=message):
        model(**token_batch(), cluster_ids=ids)
    assert torch.isfinite(model(**token_batch(), cluster_ids=IDS).loss)


class TestGenerate:
    def test_each_sample_generates_as_if_it_were_alone(self):
        model, ids = build(), OF_PROMPTS
        together = model.generate(prompt(), cluster_ids=ids, **GREEDY)
        for row in range(3):
            alone = model.generate(prompt()[row : row + 1], cluster_ids=ids[row : row + 1], **GREEDY)
            assert torch.equal(together[row : row + 1], alone)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_beams_stay_aligned(self, use_cache):
        model, ids = build(), OF_PROMPTS
        settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
        together = model.generate(prompt(), cluster_ids=ids, **settings)
        for row in range(3):
            alone = model.generate(prompt()[row : row + 1], cluster_ids=ids[row : row + 1], **settings)
            assert torch.equal(together[2 * row : 2 * row + 2], alone)

    def test_several_answers_to_one_prompt_share_its_cluster(self):
        model, ids = build(), torch.tensor([0, 3])
        settings = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
        seen = []
        layer = next(iter(layers_of(model).values()))
        layer.register_forward_pre_hook(
            lambda module, args: seen.append(module.dispatch("default", args[0], args[0])[1].plan.example_index)
        )
        model.generate(prompt(2), cluster_ids=ids, **settings)
        with layer.recorder.context.surround({"cluster_ids": ids}):
            expected = layer.dispatch("default", torch.zeros(2, 1, 1), torch.zeros(0))[1].plan.example_index
        assert len(seen) == 6
        assert all(torch.equal(index, expected.repeat_interleave(3, dim=0)) for index in seen)

    def test_ids_differ_from_no_ids_and_misspelt_arguments_are_refused(self):
        model = build(fallback="universal")
        ids = OF_PROMPTS
        assert not torch.equal(model.generate(prompt(), cluster_ids=ids, **GREEDY), model.generate(prompt(), **GREEDY))
        with pytest.raises(ValueError, match="cluster_idz"):
            model.generate(prompt(), cluster_idz=ids, **GREEDY)

    @pytest.mark.parametrize("ids", [[1], [1, 2], [1, 2, 3]], ids=len)
    def test_a_number_of_ids_that_is_not_that_of_the_prompts_is_refused(self, ids):
        with pytest.raises(ValueError, match=f"cluster_ids has {len(ids)} entries, but generate got 4 prompts"):
            build().generate(prompt(4), cluster_ids=torch.tensor(ids), **GREEDY)

    def test_a_hand_written_loop_needs_the_ids_only_once(self):
        model, ids = build(), OF_PROMPTS
        expected = model.generate(prompt(), cluster_ids=ids, **GREEDY)
        tokens, step = prompt(), {"input_ids": prompt(), "cluster_ids": ids}
        with torch.no_grad():
            for _ in range(GREEDY["max_new_tokens"]):
                output = model(**step, use_cache=True)
                new = output.logits[:, -1:].argmax(dim=-1)
                tokens = torch.cat([tokens, new], dim=1)
                step = {"input_ids": new, "past_key_values": output.past_key_values}
        assert torch.equal(tokens, expected)

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "select", "repeat"],
    )
    def test_clusters_follow_the_sequences_of_a_cache(self, change, rows):
        model, ids, new = build(), OF_PROMPTS, torch.full((len(rows), 1), 7)
        with torch.no_grad():
            cache = model(prompt(), cluster_ids=ids, use_cache=True).past_key_values
            kept = copy.deepcopy(cache)
            change(cache)
            found = model(new, past_key_values=cache).logits
            expected = model(torch.cat([prompt()[rows], new], dim=1), cluster_ids=ids[rows]).logits[:, -1:]
            torch.testing.assert_close(found, expected)
            again = model(torch.cat([prompt(), new[:1].expand(3, 1)], dim=1), cluster_ids=ids).logits[:, -1:]
            torch.testing.assert_close(model(new[:1].expand(3, 1), past_key_values=kept).logits, again)

    @pytest.mark.parametrize("name", ["t5", "opt"])
    def test_other_kinds_of_model_generate(self, name):
        model = wrap(architecture(name).build())
        ids = OF_PROMPTS
        tokens = prompt() % 20 + 2
        settings = {**GREEDY, "num_beams": 2}
        together = model.generate(input_ids=tokens, cluster_ids=ids, **settings)
        for row in range(3):
            alone = model.generate(input_ids=tokens[row : row + 1], cluster_ids=ids[row : row + 1], **settings)
            assert torch.equal(together[row : row + 1], alone)

    def test_a_model_whose_generate_calls_its_language_model_directly(self):
        model = wrap(architecture("blip-2").build())
        names = {layer.name.rpartition(".")[2] for layer in layers_of(model).values()}
        assert names == {"q_proj", "v_proj"} and blip2_config().model_type == "blip-2"
        batch = {name: value for name, value in image_and_text().items() if name != "labels"}
        ids = [torch.full((len(batch["input_ids"]),), cluster) for cluster in (0, 0, 4)]
        found = [model.generate(**batch, cluster_ids=of_batch, **GREEDY) for of_batch in ids]
        assert torch.equal(found[0], found[1]) and found[0].shape == found[2].shape


def examples(num_rows: int = 8) -> list[dict]:
    batch = token_batch(num_rows, num_padding=0)
    return [{**{k: v[i].tolist() for k, v in batch.items()}, "cluster_ids": i % 6} for i in range(num_rows)]


def spy_on_ids(model) -> list[torch.Tensor]:
    """The ids of every forward pass, as the layers see them."""
    seen = []
    layer = next(iter(layers_of(model).values()))

    def look(module, args):
        seen.append(module.scopes["default"].lookup.of_running_pass(module.recorder.context).ids)

    layer.register_forward_pre_hook(look)
    return seen


def arguments(folder, cls=TrainingArguments, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "use_cpu": True}
    defaults |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True}
    return cls(str(folder), **{**defaults, **settings})


class TestTrainers:
    @pytest.mark.parametrize("with_collator", [False, True], ids=["default-collator", "padding-collator"])
    def test_the_unchanged_trainer_hands_them_over(self, tmp_path, with_collator):
        from datasets import Dataset

        model = build()
        seen = spy_on_ids(model)
        dataset = Dataset.from_list([{**row, "note": "to be removed"} for row in examples()])
        collator = {"data_collator": DataCollatorWithPadding(tiny_tokenizer())} if with_collator else {}
        trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset, **collator)
        trainer.train()
        assert [ids.tolist() for ids in seen] == [[0, 1, 2, 3], [4, 5, 0, 1]]
        assert trainer.evaluate()["eval_loss"] > 0

    def test_a_model_adapted_by_transformers_trains_too(self, tmp_path):
        base = tiny_llama()
        base.add_adapter(MoCLEConfig(**{**SETTINGS, "task_type": None}))
        before = {name: p.clone() for name, p in base.named_parameters() if "mocle_B" in name}
        Trainer(base, arguments(tmp_path, learning_rate=1e-2), train_dataset=examples()).train()
        after = dict(base.named_parameters())
        assert all(not torch.equal(after[name], value) for name, value in before.items())

    def test_seq2seq_evaluation_generates_with_them(self, tmp_path):
        model = wrap(architecture("t5").build())
        rows = [{"input_ids": [i % 20 + 2 for i in row["input_ids"]], "labels": [3, 4, 5]} for row in examples(4)]
        rows = [{**row, "cluster_ids": cluster} for cluster, row in enumerate(rows)]
        args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=5)
        metrics = Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows).evaluate()
        assert metrics["eval_loss"] > 0

    def test_a_wrapped_collator_keeps_them(self):
        def collator(rows):
            assert all(set(row) == {"input_ids"} for row in rows)
            return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

        rows = [{"input_ids": [1, 2], "cluster_ids": 3}, {"input_ids": [4, 5], "cluster_ids": [0, 2]}]
        assert ClusterIdsCollator(collator)(rows)["cluster_ids"].tolist() == [3, 0, 2]
        with pytest.raises(ValueError, match=r"Example 1 .* only \['input_ids'\].*add_cluster_ids"):
            ClusterIdsCollator(collator)([rows[0], {"input_ids": [1, 2]}])

    def test_expert_load_counts_examples(self):
        model = build(top_k=2)
        with record_expert_load(model) as load:
            model(**token_batch(), cluster_ids=IDS)
        counts = load.by_router()
        assert list(counts) == [f"model.layers.{i}" for i in range(3)]
        assert all(sum(of_router) == 4 and len(of_router) == 3 for of_router in counts.values())


@pytest.mark.parametrize("bad", [{}, {"cluster_ids": 0.5}], ids=["missing", "float"])
def test_a_trainer_stops_at_bad_ids_before_the_first_step(tmp_path, bad):
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"], **bad} for row in examples()]
    model = build()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="cluster_ids"):
        Trainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
