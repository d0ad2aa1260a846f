"""Rewards that are Python functions: the built-in world's, and `module:function` of the user's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError, nearest


def load_world(name: str, dtype: str) -> Any:
    """Return the gold reward of the built-in world, as `world:<group>` that of one of its groups."""
    from rlhf_lightning.world import gold_reward, group_gold

    group = name.partition(":")[2]
    return group_gold(group) if group else gold_reward


def load_function(name: str, dtype: str) -> Any:
    """Return the function `module:function`, looked up from the working directory too.

    Raises:
        UserError: when the module or the function is not there, or it is no function.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        reward = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UserError(f"reward_from={name}: the module {module} cannot be imported ({error})") from error
    except AttributeError:
        names = [n for n in vars(sys.modules[module]) if not n.startswith("_")]
        raise UserError(f"reward_from={name}: {module} has no {function}.{nearest(function, names)}") from None
    if not callable(reward):
        raise UserError(f"reward_from={name}: {function} is {type(reward).__name__}, not a function")
    return reward
