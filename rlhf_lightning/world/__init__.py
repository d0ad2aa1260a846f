"""The built-in world: unlimited rows from a seed, labellers with declared biases, an exact gold reward."""

from rlhf_lightning.world.gold import Score, gold, gold_reward, is_refusal, measures
from rlhf_lightning.world.labeller import Labeller, group_gold, group_value
from rlhf_lightning.world.rows import KINDS, rows

VERSION = 3  # part of every cache key; raise it when a row or a score changes

__all__ = [
    "KINDS", "VERSION", "Labeller", "Score", "gold", "gold_reward", "group_gold", "group_value", "is_refusal",
    "measures", "rows",
]  # fmt: skip
