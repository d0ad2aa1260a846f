"""Fixtures of the labeling page's browser tests: tabs, and servers that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf_lightning.feedback.labeling.server import Server
from rlhf_lightning.feedback.labeling.service import Labeling
from tests.helpers.browser import Tabs


@pytest.fixture
def tabs(chromium: Any) -> Iterator[Tabs]:
    """Pages that are checked and closed at the end."""
    opened = Tabs(chromium)
    yield opened
    opened.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Labeling], Server]]:
    """Serves labelings until the end of the test."""
    servers: list[Server] = []

    def start(labeling: Labeling) -> Server:
        servers.append(Server(labeling))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        server.labeling.store.close()
