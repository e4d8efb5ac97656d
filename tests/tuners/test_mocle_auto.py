"""With its encoder attached, a model finds the clusters of its prompts by itself, wherever it was loaded from."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import safetensors.torch
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from test_mocle_formula import layers_of
from tiny_encoder import TOPICS, WIDTH, WORDS
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from peft_moe import InstructionClusterer, MoCLEConfig, attach_encoder
from peft_moe.tuners.mocle.encoder import SentenceEncoder
from tiny_models import tiny_llama


# each of them is a cluster of its own
TEXTS = [" ".join(words) for words in TOPICS.values()]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>"]
    words = [*special, "user", "assistant", *WORDS, *(f"w{i}" for i in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        padding_side="left",
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(max_position_embeddings=128).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def config_of(clusterer, **settings) -> MoCLEConfig:
    defaults = {"num_experts": 3, "r": 2, "lora_dropout": 0.0, "gate_noise_std": 0.0, "init_lora_weights": False}
    return MoCLEConfig.from_clusterer(
        clusterer, **{**defaults, "task_type": "CAUSAL_LM", "temperature": 0.01, **settings}
    )


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, base_folder, clusterer) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config_of(clusterer))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(base_folder, adapter_folder) -> PeftModel:
    return load_by_peft(base_folder, adapter_folder, is_trainable=True).eval()


def tokens_of(texts: list[str]) -> dict[str, torch.Tensor]:
    batch = word_tokenizer()(texts, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def spy(model, adapter_name: str = "default") -> list[list[int] | None]:
    """The clusters in each call of the first layer; `None` where the adapter knows none."""
    seen = []

    def look(layer, args):
        ids = layer.scopes[adapter_name].lookup.of_running_pass(layer.recorder.context).ids
        seen.append(None if ids is None else ids.tolist())

    next(iter(layers_of(model).values())).register_forward_pre_hook(look)
    return seen


def load_by_peft(base_folder, adapter_folder, **settings):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter_folder, **settings)


def load_by_transformers(base_folder, adapter_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.load_adapter(adapter_folder)
    return model


LOADERS = {
    "peft": load_by_peft,
    "auto class": lambda _, adapter_folder: AutoPeftModelForCausalLM.from_pretrained(adapter_folder),
    "transformers": load_by_transformers,
    "little memory": partial(load_by_peft, low_cpu_mem_usage=True),
}


class TestWithoutIds:
    @pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
    def test_prompts_go_where_the_clusterer_sends_them(self, load, base_folder, adapter_folder, clusterer):
        model = load(base_folder, adapter_folder).eval()
        batch, ids = tokens_of(TEXTS), clusterer.predict(TEXTS)
        expected = model(**batch, cluster_ids=ids).logits
        with pytest.raises(ValueError, match="got no cluster_ids.*attach_encoder"):
            model(**batch)
        attach_encoder(model)
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, cluster_ids=ids, **GREEDY))

    @pytest.mark.parametrize(
        "settings",
        [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
        ids=["cache", "no-cache", "beams", "static-cache"],
    )
    def test_every_step_of_a_generation_keeps_the_clusters_of_the_prompt(self, model, clusterer, settings):
        attach_encoder(model)
        seen = spy(model)
        found = model.generate(**tokens_of(TEXTS), **GREEDY, **settings)
        ids = clusterer.predict(TEXTS)
        assert seen == [ids.tolist()] * 5
        assert torch.equal(found, model.generate(**tokens_of(TEXTS), cluster_ids=ids, **GREEDY, **settings))

    def test_a_hand_written_loop_keeps_them_too(self, model, clusterer):
        attach_encoder(model)
        seen = spy(model)
        with torch.no_grad():
            output = model(**tokens_of(TEXTS), use_cache=True)
            new = output.logits[:, -1:].argmax(dim=-1)
            model(input_ids=new, past_key_values=output.past_key_values)
        assert seen == [clusterer.predict(TEXTS).tolist()] * 2

    @pytest.mark.parametrize("fallback", ["error", "universal"])
    def test_a_fresh_cache_is_no_continuation(self, base_folder, clusterer, fallback):
        from transformers import DynamicCache

        base = AutoModelForCausalLM.from_pretrained(base_folder)
        model = get_peft_model(base, config_of(clusterer, fallback=fallback)).eval()
        attach_encoder(model)
        seen = spy(model)
        model(**tokens_of(TEXTS), past_key_values=DynamicCache(config=base.config))
        assert seen == [clusterer.predict(TEXTS).tolist()]

    def test_texts_are_encoded_once_and_outside_of_the_autocast_of_the_model(self, model, tiny_folder, monkeypatch):
        encoder, encoded = SentenceEncoder(tiny_folder), []
        original = encoder.encode

        def encode(texts):
            encoded.append((sorted(texts), torch.is_autocast_enabled("cpu")))
            return original(texts)

        monkeypatch.setattr(encoder, "encode", encode)
        attach_encoder(model, encoder, tokenizer=word_tokenizer())
        # the check of the width is no text
        encoded.clear()
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                model(**tokens_of(TEXTS))
        assert encoded == [(sorted(TEXTS), False)]

    def test_given_ids_win(self, model):
        attach_encoder(model)
        seen = spy(model)
        model(**tokens_of(TEXTS), cluster_ids=torch.tensor([2, 2, 2]))
        assert seen == [[2, 2, 2]]

    def test_pipelines_route_texts_and_chats_by_themselves(self, model, clusterer):
        attach_encoder(model)
        seen = spy(model)
        pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer())
        settings = {"max_new_tokens": 2, "do_sample": False}
        for text in TEXTS:
            pipe(text, **settings)
            pipe([{"role": "user", "content": text}], **settings)
        expected = [[i] for i in clusterer.predict(TEXTS).tolist() for _ in range(4)]
        assert seen == expected

    def test_an_answer_takes_no_part_in_training(self, model, clusterer, tmp_path):
        attach_encoder(model)
        rows = []
        for text in TEXTS:
            ids = word_tokenizer()(f"{text} w7 w8 w9 w0 w0 w0")["input_ids"]
            rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
        seen = spy(model.train())
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train()
        assert seen == [clusterer.predict(TEXTS).tolist()]

    def test_packed_examples_are_found_one_by_one(self, model, clusterer):
        attach_encoder(model)
        seen = spy(model)
        rows = [tokens_of([text])["input_ids"] for text in TEXTS]
        packed = torch.nn.functional.pad(torch.cat(rows, dim=1), (0, 2))
        positions = torch.tensor([[0, 1, 2, 3] * 3 + [0, 0]])
        model(input_ids=packed, position_ids=positions)
        assert seen == [clusterer.predict(TEXTS).tolist()]

    def test_gradient_checkpointing_asks_once(self, model, clusterer):
        attach_encoder(model)
        seen = spy(model.train())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model(**tokens_of(TEXTS), labels=tokens_of(TEXTS)["input_ids"]).loss.backward()
        assert seen == [clusterer.predict(TEXTS).tolist()] * 2

    def test_inference_mode_leaves_nothing_that_training_cannot_use(self, model):
        attach_encoder(model)
        with torch.inference_mode():
            model(**tokens_of(TEXTS))
        model.train()(**tokens_of(TEXTS), labels=tokens_of(TEXTS)["input_ids"]).loss.backward()

    def test_a_copy_routes_by_itself(self, model, clusterer):
        attach_encoder(model)
        expected = model(**tokens_of(TEXTS)).logits
        assert torch.equal(copy.deepcopy(model)(**tokens_of(TEXTS)).logits, expected)

    def test_a_reference_adapter_made_from_the_configuration_has_the_centroids(self, model, clusterer):
        model.add_adapter("ref", model.peft_config["default"])
        for name, centroids in model.named_buffers():
            if "mocle_centroids" in name:
                assert torch.equal(centroids, clusterer.centroids), name
        assert sum("mocle_centroids" in name for name, _ in model.named_buffers()) == 2

    @pytest.mark.parametrize("how", ["added", "loaded"])
    def test_an_adapter_of_the_same_clustering_that_comes_later_finds_them_too(
        self, model, clusterer, adapter_folder, how
    ):
        attach_encoder(model)
        if how == "added":
            model.add_adapter("ref", model.peft_config["default"])
        else:
            model.load_adapter(adapter_folder, "ref")
        model.delete_adapter("default")
        model.set_adapter("ref")
        seen = spy(model, "ref")
        model(**tokens_of(TEXTS))
        assert seen == [clusterer.predict(TEXTS).tolist()]

    @pytest.mark.parametrize(
        "difference",
        [{}, {"centroids": torch.eye(3, WIDTH)}, {"template": "about {}"}, {"instruction_pattern": "(.*)"}],
        ids=["none", "centroids", "template", "pattern"],
    )
    def test_one_of_another_clustering_does_not(self, model, clusterer, tiny_folder, difference):
        other = InstructionClusterer(**{"centroids": clusterer.centroids, "encoder": tiny_folder, **difference})
        attach_encoder(model)
        model.add_adapter("other", config_of(other, fallback="universal"))
        model.set_adapter("other")
        seen = spy(model, "other")
        model(**tokens_of(TEXTS))
        assert seen == [None if difference else clusterer.predict(TEXTS).tolist()]


class TestRefusals:
    def test_an_adapter_without_centroids(self):
        model = get_peft_model(tiny_llama(), MoCLEConfig(num_clusters=3))
        with pytest.raises(ValueError, match="carries no centroids.*from_clusterer"):
            attach_encoder(model)

    def test_a_model_without_adapter(self):
        with pytest.raises(ValueError, match="has no MoCLE adapter"):
            attach_encoder(tiny_llama())

    def test_an_adapter_that_is_not_there(self, model):
        with pytest.raises(ValueError, match=r"no MoCLE adapter 'other' \(it has \['default'\]\)"):
            attach_encoder(model, adapter_name="other")

    def test_an_encoder_of_another_width(self, model):
        encoder = SentenceEncoder("narrow")
        encoder.embedding_dim = 8
        with pytest.raises(ValueError, match="vectors of width 8, but the centroids .* are 32 wide"):
            attach_encoder(model, encoder)

    def test_a_tokenizer_that_cannot_be_found(self, clusterer):
        model = get_peft_model(tiny_llama(), config_of(clusterer))
        with pytest.raises(ValueError, match="tokenizer of the base model could not be found.*tokenizer="):
            attach_encoder(model)

    def test_embeddings_in_place_of_tokens(self, model):
        attach_encoder(model)
        embeddings = model.get_input_embeddings()(tokens_of(TEXTS)["input_ids"])
        with pytest.raises(ValueError, match="got no cluster_ids"):
            model(inputs_embeds=embeddings)

    def test_a_prompt_without_text(self, model):
        attach_encoder(model)
        with pytest.raises(ValueError, match="Row 1 has no"):
            model(**tokens_of([TEXTS[0], "<eos>"]))

    def test_centroids_that_were_changed(self, base_folder, adapter_folder, tmp_path):
        tensors = safetensors.torch.load_file(f"{adapter_folder}/adapter_model.safetensors")
        (name,) = [name for name in tensors if "centroids" in name]
        tensors[name][0, 0] += 1e-3
        safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.loads(open(f"{adapter_folder}/adapter_config.json").read())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="centroids in the file .* are not those .*centroids_sha256"):
            load_by_peft(base_folder, str(tmp_path))

    def test_a_configuration_that_names_centroids_but_has_none(self, adapter_folder):
        model = get_peft_model(tiny_llama(max_position_embeddings=128), MoCLEConfig.from_pretrained(adapter_folder))
        with pytest.raises(ValueError, match="centroids.*from_clusterer"):
            model.train()(**tokens_of(TEXTS), cluster_ids=torch.tensor([0, 1, 2]))


IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper + ' : ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT : {% endif %}"
)


class TestImages:
    @pytest.fixture
    def processor(self):
        from models.tiny_llava import tiny_processor

        processor = tiny_processor()
        processor.tokenizer.add_tokens([":", "USER", "ASSISTANT", *WORDS])
        processor.chat_template = processor.tokenizer.chat_template = IMAGE_TEMPLATE
        return processor

    @pytest.fixture
    def model(self, clusterer):
        from models.tiny_llava import tiny_llava

        base = tiny_llava(vocab_size=96, max_position_embeddings=256)
        torch.manual_seed(7)
        return get_peft_model(base, config_of(clusterer, task_type=None)).eval()

    @pytest.mark.parametrize("processor_is_known", [True, False], ids=["processor", "tokenizer"])
    def test_the_image_pipeline_routes_by_the_question_alone(self, model, processor, clusterer, processor_is_known):
        import numpy as np
        from PIL import Image

        attach_encoder(model, tokenizer=processor if processor_is_known else processor.tokenizer)
        seen = spy(model)
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        generator = np.random.default_rng(0)
        for text, cluster in zip(TEXTS, clusterer.predict(TEXTS).tolist()):
            for _ in range(2):
                image = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
                seen.clear()
                pipe(text=[{"role": "user", "content": content}], max_new_tokens=2, do_sample=False)
                assert seen and all(ids == [cluster] for ids in seen)
