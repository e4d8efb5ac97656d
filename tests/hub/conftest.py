"""The Hub of the tests, one for each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub_server import HubServer


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub that has to understand every request of a file's tests."""
    with HubServer() as server:
        yield server
        assert server.unhandled == []
