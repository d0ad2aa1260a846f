"""Reinforcement learning from human feedback for PyTorch Lightning and Hydra."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.data.datamodules import DemonstrationData, PreferenceData, PromptData
    from rlhf_lightning.data.template import Template
    from rlhf_lightning.feedback.aggregation import aggregate
    from rlhf_lightning.feedback.agreement import agreement
    from rlhf_lightning.generation.continuous import ContinuousEngine
    from rlhf_lightning.generation.engine import Engine, Generations
    from rlhf_lightning.generation.local import LocalEngine
    from rlhf_lightning.generation.vllm import VLLMEngine
    from rlhf_lightning.modules.dpo import DPO
    from rlhf_lightning.modules.online_dpo import OnlineDPO
    from rlhf_lightning.modules.ppo import PPO
    from rlhf_lightning.modules.reward import RewardModel
    from rlhf_lightning.modules.sft import SFT
    from rlhf_lightning.ops.groups import Group, GroupBatch, GroupList, pack

__version__ = "0.1.0"
__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "ContinuousEngine",
    "DemonstrationData",
    "Engine",
    "Generations",
    "Group",
    "GroupBatch",
    "GroupList",
    "LocalEngine",
    "OnlineDPO",
    "PreferenceData",
    "PromptData",
    "RewardModel",
    "Template",
    "VLLMEngine",
    "__version__",
    "aggregate",
    "agreement",
    "pack",
]

_MODULES = {
    "data.datamodules": ("DemonstrationData", "PreferenceData", "PromptData"),
    "data.template": ("Template",),
    "feedback.aggregation": ("aggregate",),
    "feedback.agreement": ("agreement",),
    "generation.continuous": ("ContinuousEngine",),
    "generation.engine": ("Engine", "Generations"),
    "generation.local": ("LocalEngine",),
    "generation.vllm": ("VLLMEngine",),
    "modules.dpo": ("DPO",),
    "modules.online_dpo": ("OnlineDPO",),
    "modules.ppo": ("PPO",),
    "modules.reward": ("RewardModel",),
    "modules.sft": ("SFT",),
    "ops.groups": ("Group", "GroupBatch", "GroupList", "pack"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `rlhf --help` does not import torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
