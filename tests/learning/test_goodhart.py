"""The Goodhart control: a proxy that is optimised without a KL penalty rises while what it stands for falls."""

from __future__ import annotations

import pytest

from rlhf_lightning.rewards.scoring import load_reward
from tests.helpers.lightning import quiet_lightning
from tests.learning.small_world import SmallWorld

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("small world")]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1])
@quiet_lightning
def test_proxy_up_and_gold_down_without_a_kl_penalty(small: SmallWorld, seed: int) -> None:
    """The proxy is a reward model from 512 fair preferences: right about the SFT model's answers, not far from them.

    The same 120 updates with beta 0.2 are the control. The gold reward itself as the proxy, at beta 0, raises gold by
    0.25: what it loses here it loses to the proxy.
    """
    proxy = load_reward(small.reward_model(seed, steps=8))
    before = small.sft_answers()
    free, held = (small.ppo(seed, proxy, kl_beta=beta, lr=1e-3) for beta in (0.0, 0.2))
    proxies, golds = (
        [after.gain(of(after), of(before)) for after in (free, held)]
        for of in (lambda answers: answers.scores(proxy), lambda answers: answers.gold)
    )
    # mean gains over SFT on held-out prompts at seeds 0 to 2, each with an interval of about +-0.12
    assert proxies[0][1] > 0.5  # 1.17, 1.05, 0.90; lower ends from 0.79
    assert golds[0][2] < -0.2  # -0.59, -0.59, -0.63; upper ends up to -0.45
    assert proxies[1][1] > 0.2  # 0.75, 0.50, 0.59; lower ends from 0.42
    assert golds[1][1] > -0.15  # 0.12, 0.18, 0.15; lower ends from 0.00
