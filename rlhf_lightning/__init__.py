"""Reinforcement learning from human feedback for PyTorch Lightning and Hydra."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "SFT": "modules.sft",
    "RewardModel": "modules.reward",
    "DPO": "modules.dpo",
    "PPO": "modules.ppo",
    "DemonstrationData": "data.datamodules",
    "PreferenceData": "data.datamodules",
    "PromptData": "data.datamodules",
    "Group": "ops.groups",
    "GroupBatch": "ops.groups",
    "pack": "ops.groups",
    "Template": "data.template",
    "Sampler": "generation.local",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `rlhf --help` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
