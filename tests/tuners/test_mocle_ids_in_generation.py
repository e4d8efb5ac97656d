"""`cluster_ids` of prompts reach every step of their generation."""

from __future__ import annotations

import copy

import pytest
import torch
from mocle_calls import GREEDY, architecture, prompt, wrap
from test_mocle_formula import build, layers_of

from tiny_architectures import blip2_config, image_and_text


class TestGenerate:
    def test_each_sample_generates_as_if_it_were_alone(self):
        model, ids = build(), torch.tensor([0, 3, 5])
        together = model.generate(prompt(), cluster_ids=ids, **GREEDY)
        for row in range(3):
            alone = model.generate(prompt()[row : row + 1], cluster_ids=ids[row : row + 1], **GREEDY)
            assert torch.equal(together[row : row + 1], alone)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_beams_stay_aligned(self, use_cache):
        model, ids = build(), torch.tensor([0, 3, 5])
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
        ids = torch.tensor([0, 3, 5])
        assert not torch.equal(model.generate(prompt(), cluster_ids=ids, **GREEDY), model.generate(prompt(), **GREEDY))
        with pytest.raises(ValueError, match="cluster_idz"):
            model.generate(prompt(), cluster_idz=ids, **GREEDY)

    @pytest.mark.parametrize("ids", [[1], [1, 2], [1, 2, 3]], ids=len)
    def test_a_number_of_ids_that_is_not_that_of_the_prompts_is_refused(self, ids):
        with pytest.raises(ValueError, match=f"cluster_ids has {len(ids)} entries, but generate got 4 prompts"):
            build().generate(prompt(4), cluster_ids=torch.tensor(ids), **GREEDY)

    def test_a_hand_written_loop_needs_the_ids_only_once(self):
        model, ids = build(), torch.tensor([0, 3, 5])
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
        model, ids, new = build(), torch.tensor([0, 3, 5]), torch.full((len(rows), 1), 7)
        with torch.no_grad():
            cache = model(prompt(), cluster_ids=ids, use_cache=True).past_key_values
            kept = copy.deepcopy(cache)
            change(cache)
            found = model(new, past_key_values=cache).logits
            expected = model(torch.cat([prompt()[rows], new], dim=1), cluster_ids=ids[rows]).logits[:, -1:]
            torch.testing.assert_close(found, expected)
            again = model(torch.cat([prompt(), new[:1].expand(3, 1)], dim=1), cluster_ids=ids).logits[:, -1:]
            torch.testing.assert_close(model(new[:1].expand(3, 1), past_key_values=kept).logits, again)

    def test_weights_that_change_between_two_calls_count(self):
        model, ids = build(), torch.tensor([0, 3, 5])
        with torch.no_grad():
            before = model(prompt(), cluster_ids=ids).logits
            for layer in layers_of(model).values():
                for gate in layer.mocle_gate.values():
                    gate.weight.mul_(-1)
            after = model(prompt(), cluster_ids=ids).logits
        assert not torch.equal(before, after)
        assert torch.equal(after, model(prompt(), cluster_ids=ids).logits)

    @pytest.mark.parametrize("name", ["t5", "opt"])
    def test_other_kinds_of_model_generate(self, name):
        model = wrap(architecture(name).build())
        ids = torch.tensor([0, 3, 5])
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
        batch = image_and_text()
        rows = batch["input_ids"].shape[0]
        found = [
            model.generate(
                **{k: v for k, v in batch.items() if k != "labels"}, cluster_ids=torch.full((rows,), c), **GREEDY
            )
            for c in (0, 0, 4)
        ]
        assert torch.equal(found[0], found[1]) and found[0].shape == found[2].shape
