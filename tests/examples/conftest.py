"""Shared by the tests of the examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pretrained import smollm2_path
from tiny_models import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny model with random weights and the tokenizer of the real one, as a folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder
