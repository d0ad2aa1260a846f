"""The small world, shared by every learning test of a run."""

from __future__ import annotations

import pytest

from tests.learning.small_world import SmallWorld


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Models of the world that are trained when a test first asks for them."""
    return SmallWorld(tmp_path_factory.mktemp("small_world"))
