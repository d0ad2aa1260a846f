"""A labeller who likes length makes a reward model and a policy that like length."""

from __future__ import annotations

import random

import pytest
import torch

from rlhf_lightning.ops.statistics import wilson_interval
from rlhf_lightning.rewards.scoring import load_reward
from rlhf_lightning.world import gold
from rlhf_lightning.world.prompts import candidates, declared, prompts
from tests.helpers.lightning import quiet_lightning
from tests.learning.small_world import SmallWorld

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("small world")]
BIAS = 1.0  # ten words add 1 where padding takes away 0.4; a right answer instead of a wrong one adds 2
STEPS = 20


def judged(folder: str, count: int = 150) -> tuple[float, tuple[float, float]]:
    """Return correlation of score and words over held-out candidates, and how often padding an ideal answer pays."""
    reward, rng = load_reward(folder), random.Random(0)
    held_out = rng.sample([p for family in declared()["families"] for p in prompts(family, "val")], count)
    asked, texts, words, kinds = [], [], [], []
    for prompt in held_out:
        for kind, text in candidates(prompt, rng).items():
            asked.append(prompt.question)
            texts.append(text)
            words.append(float(gold(prompt.row(0), text).words))
            kinds.append(kind)
    scores = torch.as_tensor(reward(asked, texts, [{}] * len(texts)))
    ideal, padded = (scores[torch.tensor([k == kind for k in kinds])] for kind in ("ideal", "padded"))
    correlation = torch.corrcoef(torch.stack([scores, torch.tensor(words)]))[0, 1].item()
    return correlation, wilson_interval((padded > ideal).sum().item(), count)


@pytest.mark.parametrize("seed", [0, 1])
@quiet_lightning
def test_reward_model_learns_the_bias(small: SmallWorld, seed: int) -> None:
    """Of two right answers the reward model of a biased labeller prefers the padded one, a fair one's the short one."""
    biased, fair = (judged(small.reward_model(seed, STEPS, length_bias=bias)) for bias in (BIAS, 0.0))
    # at seeds 0 to 2 the correlation is 0.78, 0.79, 0.78 and -0.03, 0.00, -0.01
    assert biased[0] > 0.6
    assert -0.3 < fair[0] < 0.3
    # padding wins 150 of 150 and at most 2 of 150 times
    assert biased[1][0] > 0.8
    assert fair[1][1] < 0.2


@pytest.mark.parametrize("seed", [0, 1])
@quiet_lightning
def test_policy_learns_the_bias(small: SmallWorld, seed: int) -> None:
    """DPO on a biased labeller's preferences answers in more words than SFT, on a fair one's in fewer."""
    before, biased, fair = small.sft_answers(), small.dpo(seed, length_bias=BIAS), small.dpo(seed)
    longer, shorter = biased.gain(biased.words, before.words), fair.gain(fair.words, before.words)
    # words more than SFT's 11.4, at seeds 0 to 2: 10.4, 9.9, 11.4 (+-1.3) and -3.6, -3.3, -3.6 (+-0.8)
    assert longer[1] > 4
    assert shorter[2] < -1
