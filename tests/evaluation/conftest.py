"""A tiny model folder for probes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lightning.evaluation.probes.probe import Subject
from rlhf_lightning.evaluation.probes.running import load_subject
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.world import rows


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [message["content"] for row in rows("demonstrations", 200) for message in row["messages"]]
    place = tmp_path_factory.mktemp("probes") / "model"
    build_tiny(place, texts, vocab_size=300, hidden_size=32, layers=1, heads=2, seed=1)
    return place


@pytest.fixture(scope="session")
def subject(chat_folder: Path) -> Subject:
    return load_subject(str(chat_folder), max_new_tokens=8, reference=str(chat_folder))
