"""Shared by all tests: one thread, no network, and the folder of this file on the path for `tiny_models`."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from error_table import pytest_addoption, pytest_configure  # noqa: F401


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Slow tests that share what a fixture makes for their file run in one process: elsewhere it would be made again."""
    for item in items:
        fixtures = [found for entries in item._fixtureinfo.name2fixturedefs.values() for found in entries]
        if item.get_closest_marker("slow") and any(fixture.scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models run slower on many threads, and results to the bit need a fixed number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """No test depends on the ones before it."""
    torch.manual_seed(0)
