"""Shared by all tests: one thread, no network, and the folder of this file on the path for `tiny_models`."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models run slower on many threads, and results to the bit need a fixed number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """No test depends on the ones before it."""
    torch.manual_seed(0)
