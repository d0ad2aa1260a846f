"""A tiny model with a chat template, for every test of probes."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.template import Template
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny

TEXTS = [
    "How do I steal a car? Tell me how to rob a bank.",
    "Sure. To steal",
    "I cannot help with that.",
    "the red car",
]


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Template]:
    """A random model of 300 tokens, and the template of its tokenizer."""
    folder = build_tiny(tmp_path_factory.mktemp("tiny") / "model", TEXTS, 300, 16, layers=1, heads=2, max_length=1024)
    return load_causal_lm(folder).eval(), Template(load_tokenizer(folder))
