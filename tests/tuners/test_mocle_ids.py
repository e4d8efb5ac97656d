"""`cluster_ids` reach every layer, by whatever way a batch comes to the model, and only those that make sense."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from mocle_calls import GREEDY, architecture, prompt, wrap
from test_mocle_formula import IDS, SETTINGS, build, layers_of
from torch import nn

from peft_moe import MoCLEConfig, record_expert_load
from tiny_architectures import image_and_text
from tiny_models import tiny_llama, token_batch


OTHER_IDS = torch.tensor([2, 5])


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

    @pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
    def test_copies_call_themselves(self, way):
        model = build()
        expected = model(**token_batch(), cluster_ids=IDS).logits
        if way == "deepcopy":
            clone = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            clone = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        for layer in layers_of(model).values():
            layer.mocle_B["default"].weight.data.zero_()
        assert torch.equal(clone(**token_batch(), cluster_ids=IDS).logits, expected)
        if way == "deepcopy":  # pickle keeps no method of an instance: a loaded model generates without the argument
            assert clone.generate(prompt(), cluster_ids=torch.tensor([0, 1, 2]), **GREEDY).shape == (3, 18)

    def test_an_image_changes_no_routing(self):
        model = wrap(architecture("llava").build())
        names = {layer.name for layer in layers_of(model).values()}
        assert names and all("language_model" in name for name in names)
        routes = []
        for seed in (0, 1):
            batch = image_and_text()
            batch["pixel_values"] = torch.randn(
                batch["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)
            )
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

    def test_packed_rows_are_understood_without_the_hooks_too(self):
        model = build()
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
        inputs = {"input_ids": prompt(1)[:, :6], "position_ids": positions, "cluster_ids": torch.tensor([4, 1])}
        expected = model(**inputs).logits
        assert torch.equal(model.get_base_model().forward(**inputs).logits, expected)

    def test_a_number_of_ids_that_no_packing_explains_is_refused(self):
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
        with pytest.raises(ValueError, match="cluster_ids has 3 entries.*packed"):
            build()(input_ids=prompt(1)[:, :6], position_ids=positions, cluster_ids=torch.tensor([0, 1, 2]))


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

    def test_weights_that_an_optimizer_changes_unseen_count(self):
        model = build().eval()
        with torch.no_grad():
            before = model(**token_batch(), cluster_ids=IDS).logits
            for layer in layers_of(model).values():
                for gate in layer.mocle_gate.values():
                    gate.weight.data = -gate.weight.data
            assert not torch.equal(model(**token_batch(), cluster_ids=IDS).logits, before)

    def test_a_cache_that_was_emptied_knows_no_clusters(self):
        from transformers import DynamicCache

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

        from transformers import DynamicCache

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
