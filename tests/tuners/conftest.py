"""Shared by the tests of MoCLE's clusters: the tiny encoder and what it makes of its texts, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_encoder import TEXTS, write_tiny_encoder

from peft_moe import InstructionClusterer
from peft_moe.tuners.mocle.encoder import SentenceEncoder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def encoder(tiny_folder) -> SentenceEncoder:
    return SentenceEncoder(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def embeddings(encoder) -> torch.Tensor:
    return encoder.encode(TEXTS)


@pytest.fixture(scope="session")
def clusterer(encoder) -> InstructionClusterer:
    return InstructionClusterer.fit(TEXTS, 3, encoder=encoder, show_progress=False)
