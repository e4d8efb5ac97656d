"""Vectors of texts, from a tiny encoder with random weights."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import TEXTS, WIDTH, as_sentence_transformers
from transformers import BertModel, PreTrainedTokenizerFast

from peft_moe.tuners.mocle.encoder import SentenceEncoder


@pytest.fixture
def encoder_copy(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


class TestSentenceEncoder:
    def test_vectors_are_float32_on_the_cpu_and_need_no_gradient(self, encoder, embeddings):
        assert embeddings.shape == (len(TEXTS), WIDTH) == (96, encoder.embedding_dim)
        assert (embeddings.dtype, embeddings.device.type, embeddings.requires_grad) == (torch.float32, "cpu", False)

    def test_a_bare_model_gives_the_mean_over_its_tokens(self, encoder, tiny_folder, embeddings):
        model = BertModel.from_pretrained(tiny_folder).eval()
        batch = PreTrainedTokenizerFast.from_pretrained(tiny_folder)(TEXTS[5], return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(embeddings[5], expected, rtol=0, atol=1e-6)

    def test_the_other_texts_of_a_batch_do_not_matter(self, encoder, embeddings):
        long = [f"{text} cat dog two red" for text in TEXTS[:3]]
        mixed = encoder.encode([*TEXTS[:3], *long], batch_size=6)
        torch.testing.assert_close(mixed[:3], embeddings[:3], rtol=0, atol=1e-6)

    def test_order_and_batch_size_do_not_matter(self, encoder, embeddings):
        order = torch.randperm(len(TEXTS))
        shuffled = encoder.encode([TEXTS[index] for index in order], batch_size=7)
        torch.testing.assert_close(shuffled, embeddings[order], rtol=0, atol=1e-6)

    def test_it_is_loaded_on_first_use_only_and_its_pickle_holds_the_name_alone(self, tiny_folder):
        encoder = SentenceEncoder(tiny_folder)
        assert encoder._model is None
        before = pickle.dumps(encoder)
        assert encoder.embedding_dim == WIDTH and encoder._model is not None
        assert pickle.dumps(encoder) == before

    def test_normalisation_is_done_where_the_folder_asks_for_it(self, encoder_copy, embeddings):
        vectors = SentenceEncoder(as_sentence_transformers(encoder_copy), device="cpu").encode(TEXTS)
        torch.testing.assert_close(vectors, torch.nn.functional.normalize(embeddings), rtol=0, atol=1e-6)

    def test_long_texts_are_cut_where_the_folder_says(self, encoder_copy):
        encoder = SentenceEncoder(as_sentence_transformers(encoder_copy, max_seq_length=5), device="cpu")
        vectors = encoder.encode(["red green blue", "red green blue cat dog"])
        torch.testing.assert_close(vectors[0], vectors[1])

    def test_texts_are_lowered_where_the_folder_says(self, encoder_copy):
        encoder = SentenceEncoder(as_sentence_transformers(encoder_copy, do_lower_case=True), device="cpu")
        vectors = encoder.encode(["Red CAT", "red cat"])
        torch.testing.assert_close(vectors[0], vectors[1])

    def test_without_sentence_transformers_the_extra_is_named(self, tiny_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ImportError, match=r"pip install peft-moe\[cluster\].*cluster_ids"):
            SentenceEncoder(tiny_folder).encode(["red"])

    def test_a_file_is_refused(self, tiny_folder):
        with pytest.raises(OSError, match=r"could not be loaded .*model.safetensors is a file"):
            SentenceEncoder(tiny_folder / "model.safetensors").encode(["red"])

    def test_weights_in_half_precision_are_computed_in_float32(self, encoder_copy):
        weights = load_file(encoder_copy / "model.safetensors")
        save_file({name: w.half() if w.is_floating_point() else w for name, w in weights.items()},
                  encoder_copy / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        assert SentenceEncoder(encoder_copy).encode(["red"]).dtype == torch.float32

    def test_an_unknown_model_is_named(self):
        with pytest.raises(OSError, match=r"(?s)'no-such-encoder' could not be loaded.*HF_HUB_OFFLINE"):
            SentenceEncoder("no-such-encoder").encode(["red"])

    def test_weights_as_pickle_are_not_read(self, encoder_copy):
        torch.save(load_file(encoder_copy / "model.safetensors"), encoder_copy / "pytorch_model.bin")
        (encoder_copy / "model.safetensors").unlink()
        with pytest.raises(OSError, match="safetensors"):
            SentenceEncoder(encoder_copy).encode(["red"])

    @pytest.mark.parametrize("texts", [[], "red", ["red", None]], ids=["none", "one", "no text"])
    def test_bad_texts_are_refused(self, encoder, texts):
        with pytest.raises(ValueError, match="encode takes a list of at least one text"):
            encoder.encode(texts)
