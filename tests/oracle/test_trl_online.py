"""RLOO and GRPO: advantages, loss, gradient norm and ten optimizer steps equal TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.oracle.replay import LENGTHS, SAMPLES, Script, our_run, their_trainer
from tests.oracle.side_by_side import STEPS, assert_same, optimizer, quiet_trl, train_theirs

trl = pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


def grpo(folder: Path, script: Sequence[Sequence[int]], ours: Any, theirs: Any) -> Any:
    """Return our module and TRL's trainer and curve after ten updates on the same responses."""
    mine, other = Script(script), Script(script)
    module = our_run(folder, mine, optimizer(), **({"estimator": "grpo", "kl_in": "loss"} | ours))
    trainer = their_trainer(folder, other, trl.GRPOTrainer, trl.GRPOConfig, **theirs)
    curve = train_theirs(trainer)
    assert mine.prompts == other.prompts
    return module, trainer, curve


# TRL multiplies its k3 by pi / pi_old unless told not to, which turns the gradient of KL(ref : pi) into that of
# KL(pi : ref); with us k3 is the estimator of the GRPO paper and k2 has the other gradient
PLAIN_K3 = {"beta": 0.1, "use_bias_correction_kl": False}


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@quiet_trl
def test_grpo(tmp_path: Path, loss_type: str) -> None:
    """Both divide by the tokens of the step, which TRL calls "bnpo" for a batch and "dapo" for a step."""
    ours = {"ppo_epochs": 1, "temperature": 0.7, "kl_estimator": "k3", "kl_beta": 0.1}
    theirs = {"loss_type": loss_type, "temperature": 0.7, **PLAIN_K3}
    module, _, curve = grpo(tmp_path, LENGTHS, ours, theirs)
    assert_same(module.curve, curve)


@quiet_trl
def test_grpo_with_clipping(tmp_path: Path) -> None:
    """Five updates from each of two rollouts."""
    ours = {"ppo_epochs": 5, "kl_estimator": "k3", "kl_beta": 0.1, "clip_low": 0.1, "clip_high": 0.15}
    theirs = {"num_iterations": 5, "epsilon": 0.1, "epsilon_high": 0.15, **PLAIN_K3}
    module, trainer, curve = grpo(tmp_path, LENGTHS, ours, theirs)
    assert_same(module.curve, curve)
    clipped = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert max(clipped) > 0.2


@pytest.mark.parametrize(
    "how", [{"loss_type": "grpo"}, {"loss_type": "dr_grpo", "scale_rewards": False}], ids=["grpo", "dr_grpo"]
)
@quiet_trl
def test_grpo_as_a_mean_over_responses(tmp_path: Path, how: dict[str, Any]) -> None:
    """Responses of unequal lengths; the losses that are logged are means over tokens with us, so norms are compared."""
    ours = {"ppo_epochs": 1, "kl_estimator": "k3", "kl_beta": 0.1, "max_new_tokens": 8}
    module, _, curve = grpo(tmp_path, LENGTHS, ours | how, PLAIN_K3 | how | {"max_completion_length": 8})
    assert module.curve.norms == pytest.approx(curve.norms, rel=1e-4)


@quiet_trl
def test_grpo_with_the_kl_gradient_corrected(tmp_path: Path) -> None:
    """On policy, TRL's k3 times pi / pi_old has the value of k3 and the gradient of our k2."""
    module, trainer, curve = grpo(
        tmp_path, LENGTHS, {"ppo_epochs": 1, "kl_estimator": "k2", "kl_beta": 0.1}, {"beta": 0.1}
    )
    assert module.curve.norms == pytest.approx(curve.norms, rel=1e-5)
    k3 = [entry["kl"] for entry in trainer.state.log_history if "grad_norm" in entry]
    differences = [0.1 * (theirs - ours) for theirs, ours in zip(k3, module.kls, strict=True)]
    assert max(map(abs, differences)) > 1e-4
    found = [theirs - ours for theirs, ours in zip(curve.losses, module.curve.losses, strict=True)]
    assert found == pytest.approx(differences, abs=1e-6)


def rloo(folder: Path, script: Any, ours: Any, theirs: Any, rate: float) -> Any:
    """Return the same for RLOO, with plain SGD: TRL's rate is 0.5, ours is `rate`."""
    mine, other = Script(script), Script(script)
    sgd = partial(torch.optim.SGD, lr=rate)
    module = our_run(folder, mine, sgd, **({"estimator": "rloo", "kl_beta": 0.1} | ours))
    options = {"beta": 0.1, "optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0}
    trainer = their_trainer(folder, other, trl.RLOOTrainer, trl.RLOOConfig, **(options | theirs))
    curve = train_theirs(trainer)
    assert mine.prompts == other.prompts
    return module, trainer, curve


@quiet_trl
def test_rloo_with_clipping(tmp_path: Path) -> None:
    """Responses of one token, because TRL clips the ratio of a response and we that of a token."""
    module, trainer, curve = rloo(tmp_path, [(1, 1, 1)] * 4, {"ppo_epochs": 5}, {"num_iterations": 5}, rate=0.5)
    assert_same(module.curve, curve)
    clipped = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert max(clipped) > 0.2


@pytest.mark.parametrize(
    ("ours", "theirs"), [({}, {}), ({"reward_clip": 0.7}, {"reward_clip_range": (-0.7, 0.7)})], ids=["plain", "clipped"]
)
@quiet_trl
def test_rloo_on_policy(tmp_path: Path, ours: Any, theirs: Any) -> None:
    """TRL divides by responses and we by tokens: its gradient is ours times the mean length, and so is its rate."""
    length = sum(map(sum, LENGTHS)) / (SAMPLES * len(LENGTHS))
    module, trainer, curve = rloo(tmp_path, LENGTHS, {"ppo_epochs": 1, **ours}, theirs, rate=0.5 * length)
    assert [length * norm for norm in module.curve.norms] == pytest.approx(curve.norms, rel=1e-5)
    for learned, expected in zip(module.policy.lm.parameters(), trainer.model.parameters(), strict=True):
        assert_close(learned, expected, rtol=1e-4, atol=1e-6)
    # at ratio 1 the value of TRL's loss is minus the mean advantage, which leave-one-out makes 0, and that of ours
    # weighs advantages by length: only the gradients mean something
    assert curve.losses == pytest.approx([0.0] * STEPS, abs=1e-6)
