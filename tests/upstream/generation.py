"""Tests of `generate` that hold for every model with images, in the spirit of transformers' `GenerationTesterMixin`.

Each compares what `generate` gives with something computed another way: a loop of forwards without a cache, the same
tokens in another layout, or the scores of the finished sequences.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


NUM_NEW = 5


class GenerationTesterMixin:
    """To be mixed into a `unittest.TestCase` that has a `model_tester`."""

    def _model_and_inputs(
        self, *, batch_size: int = 2, seed: int = 0, **model_kwargs: Any
    ) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """A model whose next tokens depend on the whole prompt, and a batch of prompts with images."""
        torch.manual_seed(seed)
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_tester.conditional_generation_class(config).eval()
        if "attn_implementation" in model_kwargs:
            model.set_attn_implementation(model_kwargs["attn_implementation"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        return model, {name: value[:batch_size] for name, value in inputs.items()}

    def _options(self, model: PreTrainedModel, **options: Any) -> dict[str, Any]:
        """A fixed number of new tokens, none of them one that would ask for an image."""
        return {
            "max_new_tokens": NUM_NEW,
            "min_new_tokens": options.get("max_new_tokens", NUM_NEW),
            "do_sample": False,
            "suppress_tokens": [model.config.image_token_id],
            **options,
        }

    def _forbidden(self, model: PreTrainedModel) -> list[int]:
        return [model.config.image_token_id, model.config.text_config.eos_token_id]

    @torch.no_grad()
    def _greedy_by_hand(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The most likely tokens, one whole forward for each."""
        inputs = dict(inputs)
        for _ in range(NUM_NEW):
            logits = model(**inputs, use_cache=False).logits[:, -1]
            logits[:, self._forbidden(model)] = float("-inf")
            inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        return inputs["input_ids"]

    @torch.no_grad()
    def _log_likelihood(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], sequences: torch.Tensor
    ) -> torch.Tensor:
        """Of the new tokens of each sequence, from one forward, among the tokens that are allowed."""
        num_prompt = inputs["input_ids"].shape[1]
        repeats = sequences.shape[0] // inputs["input_ids"].shape[0]
        logits = model(
            input_ids=sequences,
            attention_mask=torch.ones_like(sequences),
            pixel_values=inputs["pixel_values"].repeat_interleave(repeats, dim=0),
        ).logits[:, num_prompt - 1 : -1]
        log_probs = logits.log_softmax(-1)
        return log_probs.gather(-1, sequences[:, num_prompt:, None]).squeeze(-1).sum(-1)

    def test_greedy_equals_a_loop_of_forwards(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = self._greedy_by_hand(model, inputs)
        assert len(set(expected[:, -NUM_NEW:].reshape(-1).tolist())) > 2
        assert torch.equal(model.generate(**inputs, **self._options(model)), expected)
        without_cache = model.generate(**inputs, **self._options(model, use_cache=False))
        assert torch.equal(without_cache, expected)

    def test_image_matters(self) -> None:
        model, inputs = self._model_and_inputs()
        first = model.generate(**inputs, **self._options(model, output_logits=True, return_dict_in_generate=True))
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        other = model.generate(**inputs, **self._options(model, output_logits=True, return_dict_in_generate=True))
        assert not torch.allclose(first.logits[0], other.logits[0], atol=0.0001)

    def test_sampling_the_best_token_is_greedy(self) -> None:
        model, inputs = self._model_and_inputs()
        options = self._options(model, do_sample=True, top_k=1, num_return_sequences=2)
        expected = self._greedy_by_hand(model, inputs).repeat_interleave(2, dim=0)
        assert torch.equal(model.generate(**inputs, **options), expected)

    def test_beam_scores_are_log_likelihoods(self) -> None:
        model, inputs = self._model_and_inputs()
        options = self._options(model, num_beams=3, num_return_sequences=3, length_penalty=0.0)
        output = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
        assert tuple(output.sequences.shape) == (6, inputs["input_ids"].shape[1] + NUM_NEW)
        found = output.sequences_scores
        torch.testing.assert_close(found, self._log_likelihood(model, inputs, output.sequences), rtol=1e-4, atol=1e-4)
        for sample in (0, 1):
            scores = found[3 * sample : 3 * sample + 3]
            assert torch.equal(scores, scores.sort(descending=True).values)
            assert len({tuple(row.tolist()) for row in output.sequences[3 * sample : 3 * sample + 3]}) == 3
        without_cache = model.generate(**inputs, **options, use_cache=False)
        assert torch.equal(output.sequences, without_cache)

    def test_static_cache_equals_dynamic_cache(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model))
        found = model.generate(**inputs, **self._options(model, cache_implementation="static"))
        assert torch.equal(found, expected)

    def test_compiled_forward_with_static_cache_equals_eager(self) -> None:
        model, inputs = self._model_and_inputs()
        options = self._options(model, cache_implementation="static", max_new_tokens=3)
        expected = model.generate(**inputs, **options)
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        assert torch.equal(model.generate(**inputs, **options), expected)

    def test_assisted_decoding_equals_greedy(self) -> None:
        model, inputs = self._model_and_inputs(batch_size=1)
        assistant, _ = self._model_and_inputs(seed=0)
        with torch.no_grad():
            # near the model, so that some of its tokens are taken and some are not
            for parameter in assistant.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        expected = model.generate(**inputs, **self._options(model))
        found = model.generate(**inputs, **self._options(model, assistant_model=assistant))
        assert torch.equal(found, expected)

    def test_prompt_lookup_equals_greedy(self) -> None:
        model, inputs = self._model_and_inputs(batch_size=1)
        expected = model.generate(**inputs, **self._options(model))
        found = model.generate(**inputs, **self._options(model, prompt_lookup_num_tokens=2))
        assert torch.equal(found, expected)

    def test_chunked_prefill_equals_whole_prefill(self) -> None:
        model, inputs = self._model_and_inputs()
        del inputs["pixel_values"]
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, 5)
        expected = model.generate(**inputs, **self._options(model))
        found = model.generate(**inputs, **self._options(model, prefill_chunk_size=4))
        assert torch.equal(found, expected)

    def test_embeddings_instead_of_tokens(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model))[:, -NUM_NEW:]
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        image = inputs["input_ids"] == model.config.image_token_id
        with torch.no_grad():
            features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeddings = embeddings.detach().masked_scatter(image.unsqueeze(-1), features)
        mask = inputs["attention_mask"]
        found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **self._options(model))
        assert torch.equal(found, expected)

    def test_embeddings_with_image_tokens_take_the_image(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model))[:, -NUM_NEW:]
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        found = model.generate(inputs_embeds=embeddings, **inputs, **self._options(model))
        assert torch.equal(found, expected)

    def test_generation_continues_from_a_cache(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model))
        first = model.generate(
            **inputs, **self._options(model, max_new_tokens=2, min_new_tokens=2), return_dict_in_generate=True
        )
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        second = model.generate(
            input_ids=first.sequences,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            **self._options(model, max_new_tokens=NUM_NEW - 2, min_new_tokens=NUM_NEW - 2),
        )
        assert torch.equal(second, expected)

    def test_cached_prompt_serves_several_generations(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model))
        prefix = {name: value[:, :-2] if value.dim() == 2 else value for name, value in inputs.items()}
        with torch.no_grad():
            cache = model(**prefix, past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
        for _ in range(2):
            found = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                past_key_values=copy.deepcopy(cache),
                **self._options(model),
            )
            assert torch.equal(found, expected)

    def test_left_padding_changes_nothing(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model, output_logits=True), return_dict_in_generate=True)
        padded = dict(inputs)
        padded["input_ids"] = torch.nn.functional.pad(
            inputs["input_ids"], (3, 0), value=self.model_tester.pad_token_id
        )
        padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=0)
        found = model.generate(**padded, **self._options(model, output_logits=True), return_dict_in_generate=True)
        assert torch.equal(found.sequences[:, 3:], expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_samples_of_a_batch_do_not_touch_each_other(self) -> None:
        model, inputs = self._model_and_inputs(batch_size=3)
        together = model.generate(**inputs, **self._options(model))
        for sample in range(3):
            alone = {name: value[sample : sample + 1] for name, value in inputs.items()}
            assert torch.equal(model.generate(**alone, **self._options(model))[0], together[sample])

    def test_dictionary_holds_every_step(self) -> None:
        model, inputs = self._model_and_inputs(attn_implementation="eager")
        output = model.generate(
            **inputs,
            **self._options(model),
            output_attentions=True,
            output_hidden_states=True,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        num_prompt, num_layers = inputs["input_ids"].shape[1], self.model_tester.num_hidden_layers
        for name in ("attentions", "hidden_states", "scores", "logits"):
            assert len(output[name]) == NUM_NEW, name
        for step in range(NUM_NEW):
            queries, keys = (num_prompt, num_prompt) if step == 0 else (1, num_prompt + step)
            assert [tuple(weights.shape) for weights in output.attentions[step]] == [
                (2, self.model_tester.num_attention_heads, queries, keys)
            ] * num_layers
            for weights in output.attentions[step]:
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
            assert [tuple(states.shape) for states in output.hidden_states[step]] == [
                (2, queries, self.model_tester.hidden_size)
            ] * (num_layers + 1)
            allowed = output.logits[step].clone()
            allowed[:, self._forbidden(model)] = float("-inf")
            assert torch.equal(output.scores[step], allowed)
            assert torch.equal(allowed.argmax(-1), output.sequences[:, num_prompt + step])
        assert output.past_key_values.get_seq_length() == num_prompt + NUM_NEW - 1

    def test_asking_for_router_logits_changes_no_token(self) -> None:
        model, inputs = self._model_and_inputs()
        expected = model.generate(**inputs, **self._options(model, num_beams=2))
        model.config.output_router_logits = True
        assert torch.equal(model.generate(**inputs, **self._options(model, num_beams=2)), expected)
        with torch.no_grad():
            output = model(**inputs)
        if not any(hasattr(module, "has_gate") for module in model.modules()):
            assert getattr(output, "router_logits", None) is None
            return
        assert [tuple(logits.shape) for logits in output.router_logits] == [(inputs["input_ids"].numel(), 4)] * 2

    def test_some_logits_equal_those_of_all(self) -> None:
        model, inputs = self._model_and_inputs()
        with torch.no_grad():
            logits = model(**inputs).logits
            last = model(**inputs, logits_to_keep=1).logits
            chosen = model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits
            torch.testing.assert_close(last, logits[:, -1:])
            torch.testing.assert_close(chosen, logits[:, [0, 5]])

    def test_some_logits_of_each_sample(self) -> None:
        model, inputs = self._model_and_inputs()
        positions = torch.tensor([[0, 5], [2, 3]])
        mask = torch.zeros(2, inputs["input_ids"].shape[1], dtype=torch.bool).scatter(1, positions, True)
        with torch.no_grad():
            logits = model(**inputs).logits
            expected = torch.stack([logits[0, [0, 5]], logits[1, [2, 3]]])
            torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, expected)
            torch.testing.assert_close(model(**inputs, logits_to_keep=mask).logits, expected.flatten(0, 1))

    def test_half_precision_generates(self) -> None:
        model, inputs = self._model_and_inputs()
        model = model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        expected = model.generate(**inputs, **self._options(model))
        assert torch.equal(model.generate(**inputs, **self._options(model)), expected)
        assert expected.shape[1] == inputs["input_ids"].shape[1] + NUM_NEW

    def test_generating_leaves_the_model_as_it_was(self) -> None:
        model, inputs = self._model_and_inputs()
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            logits = model(**inputs).logits
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            model.generate(**inputs, **self._options(model, **options))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)
        assert before.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
