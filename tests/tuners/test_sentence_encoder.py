"""Vectors of texts, by plain transformers and by sentence-transformers, from a tiny encoder with random weights."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import TEXTS, WIDTH, as_sentence_transformers
from transformers import BertModel, PreTrainedTokenizerFast

from peft_moe.tuners.mocle.sentence_encoder import SentenceEncoder, SentenceTransformersBackend, TransformersBackend


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

    def test_it_is_loaded_on_first_use_only(self, tiny_folder):
        encoder = SentenceEncoder(tiny_folder)
        assert encoder._backend is None
        encoder.encode(["red"])
        assert encoder._backend is not None

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

    @pytest.mark.parametrize(
        "files, message",
        [
            ({"pooling": {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}}, "pools by .*cls_token"),
            ({"pooling": {"pooling_mode": "lasttoken"}}, "pools by .*lasttoken"),
            ({"pooling": {"pooling_mode_max_tokens": True}}, "pools by .*mean_tokens.*max_tokens"),
            ({"pooling": {"include_prompt": False}}, "prompt out of pooling"),
            ({"kinds": ("Transformer", "Pooling", "Dense", "Normalize")}, "consists of .*'Dense'"),
        ],
        ids=["cls", "last token", "mean and max", "prompt", "dense layer"],
    )
    def test_plain_transformers_refuses_what_it_cannot_do(self, encoder_copy, files, message):
        with pytest.raises(ValueError, match=f"{message}.*pip install sentence-transformers"):
            TransformersBackend(as_sentence_transformers(encoder_copy, **files), torch.device("cpu"))

    @pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
    @pytest.mark.parametrize("is_bare", [True, False], ids=["bare", "with modules"])
    def test_sentence_transformers_gives_the_same(self, encoder_copy, is_bare):
        if not is_bare:
            as_sentence_transformers(encoder_copy, max_seq_length=4)
        backends = [
            kind(encoder_copy, torch.device("cpu")) for kind in (SentenceTransformersBackend, TransformersBackend)
        ]
        theirs, ours = (backend.encode(TEXTS[::7]) for backend in backends)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    def test_a_file_is_refused(self, tiny_folder):
        with pytest.raises(ValueError, match=r"model.safetensors' is a file. Give the folder .*tiny'"):
            SentenceEncoder(tiny_folder / "model.safetensors")

    def test_an_unknown_model_is_named_and_completed(self):
        with pytest.raises(
            OSError, match=r"'no-such-encoder' is no folder.*'sentence-transformers/no-such-encoder'.*OFFLINE"
        ):
            SentenceEncoder("no-such-encoder").encode(["red"])

    def test_weights_as_pickle_are_not_read(self, encoder_copy):
        torch.save(load_file(encoder_copy / "model.safetensors"), encoder_copy / "pytorch_model.bin")
        (encoder_copy / "model.safetensors").unlink()
        with pytest.raises(OSError, match="safetensors"):
            SentenceEncoder(encoder_copy).encode(["red"])

    @pytest.mark.parametrize(
        "texts, message",
        [([], "list of texts is empty"), ("red", "single string 'red'"), (["red", None], "text 1 is a NoneType")],
    )
    def test_bad_texts_are_refused(self, encoder, texts, message):
        with pytest.raises(ValueError, match=message):
            encoder.encode(texts)
