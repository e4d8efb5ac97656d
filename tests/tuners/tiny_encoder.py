"""A tiny sentence encoder with random weights, and texts of three topics that it tells apart."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


WORDS = ["red", "green", "blue", "colour", "cat", "dog", "horse", "animal", "two", "three", "sum", "number"]
TOPICS = {"colours": WORDS[:4], "animals": WORDS[4:8], "numbers": WORDS[8:]}
TEXTS = [f"{a} {b} {c}" for words in TOPICS.values() for a in words for b in words for c in words[:2]]
LABELS = [topic for topic in TOPICS for _ in range(32)]
WIDTH = 32


def write_tiny_encoder(folder: Path) -> Path:
    """A Bert of one layer with random weights, in which the words of a topic are alike; one token per word."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **specials).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = BertModel(config)
    topics = torch.randn(len(TOPICS), WIDTH).repeat_interleave(4, dim=0)
    model.embeddings.word_embeddings.weight.data[4:] = 3 * topics + 0.3 * torch.randn(len(WORDS), WIDTH)
    model.save_pretrained(folder)
    return folder


def as_sentence_transformers(
    folder: Path, *, pooling: dict | None = None, kinds=("Transformer", "Pooling", "Normalize"), **settings
):
    """Adds the files by which sentence-transformers knows how to use an encoder."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True} | (pooling or {})
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 64, "do_lower_case": False} | settings)
    )
    return folder
