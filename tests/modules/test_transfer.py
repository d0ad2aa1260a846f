"""An optimizer step reads its device once, before the weights change, and logs numbers that stay on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from rlhf_lightning import DPO, PPO, SFT, OnlineDPO, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.transfer import numbers
from tests.helpers.device import OnDevice, pretend, reads
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit, offline, test_online_dpo

GROUPS = [
    Group([1, 5, 6], [[7, 8, 2], [9, 2], [10, 11, 2]], ranks=[0, 2, 1], annotators="b"),
    Group([1, 8], [[3, 2], [4, 5, 6, 2]], ranks=[1, 0], annotators="a"),
    Group([1, 9], [[3, 4, 2], [12, 2]], annotators=None),
]
STAGES: dict[str, Callable[[], Any]] = {
    "sft": lambda: SFT(offline.lm, offline.sgd()),
    "reward": lambda: RewardModel(offline.classifier, offline.sgd(), center=0.1),
    "reward_groups": lambda: RewardModel(offline.classifier, offline.sgd(), groups=["a", "b"]),
    "plackett_luce": lambda: RewardModel(offline.classifier, offline.sgd(), loss="plackett_luce"),
    "dpo": lambda: DPO(offline.lm, offline.sgd(), reference="live", sft_coef=0.5),
    "dpo_lora": lambda: DPO(offline.lm, offline.sgd(), lora={"r": 2}),
}


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trainer", "rollout", "ppo", "online_dpo", "reward"):
        monkeypatch.setattr(f"rlhf_lightning.modules.{name}.send", pretend)


class PerStep(Callback):
    """Keeps what each microbatch read."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        reads()

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(reads())


@pytest.mark.parametrize("stage", STAGES)
@quiet_lightning
def test_a_step_reads_its_device_once(stage: str) -> None:
    """After the first, which compares the policy with its reference; microbatches before the last read nothing."""
    counted = PerStep()
    microbatches = [GROUPS[:2], GROUPS[2:]] * 2
    module = STAGES[stage]()
    offline.fit(module, offline.Batches(microbatches), 2, accumulate=2, callbacks=[counted], limit_val_batches=0)
    assert not module._losses
    assert counted.found[2:] == [[], ["tolist"]]


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("critic", [None, bandit.load_critic])
@quiet_lightning
def test_an_update_of_ppo_reads_its_device_once(
    monkeypatch: pytest.MonkeyPatch,
    critic: Any,
    warmup: int,
) -> None:
    found: list[list[str]] = []
    minibatch = PPO.minibatch

    def counted(*args: Any, **kwargs: Any) -> Any:
        reads()
        result = minibatch(*args, **kwargs)
        found.append(reads())
        return result

    monkeypatch.setattr(PPO, "minibatch", counted)
    options = {"kl_in": "reward", "entropy_coef": 0.1, "load_critic": critic, "critic_warmup": warmup}
    ptx = bandit.GroupList([Group([1, 4], [[5, 2]]), Group([1, 4], [[6, 2]])])
    module = bandit.build(microbatch_tokens=24, ppo_epochs=2, ptx_coef=0.1, **options)
    bandit.fit(module, bandit.Prompts(1, ptx=ptx))
    assert found == [["tolist"], ["tolist"]]


@quiet_lightning
def test_an_update_of_online_dpo_reads_its_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    minibatch = OnlineDPO.minibatch

    def counted(*args: Any, **kwargs: Any) -> Any:
        reads()
        result = minibatch(*args, **kwargs)
        found.append(reads())
        return result

    monkeypatch.setattr(OnlineDPO, "minibatch", counted)
    bandit.fit(test_online_dpo.build(microbatch_tokens=24), bandit.Prompts(2))  # type: ignore[arg-type]
    assert found[1] == ["tolist"]  # the first iteration compares the policy with its reference


@pytest.mark.parametrize("part", [0, 1])
@quiet_lightning
def test_a_loss_that_is_not_finite_changes_no_weight(part: int) -> None:
    """Whichever microbatch of the step it is in; its rows are named."""
    module = SFT(offline.lm, offline.sgd())
    step, seen = module.checked, []

    def poisoned(loss: Any, batch: Any) -> Any:
        seen.append(loss)
        return step(loss * float("nan") if len(seen) == part + 3 else loss, batch)

    module.checked = poisoned  # type: ignore[method-assign]
    numbered = [[Group([1, 5], [[6 + row, 2]], index=10 + row)] for row in range(4)]
    with pytest.raises(UserError, match=rf"the loss is nan at step 1, in rows \[{12 + part}\]; lower optimizer\.lr"):
        offline.fit(module, offline.Batches(numbered), 2, accumulate=2, limit_val_batches=0)
    assert len(seen) == 4
    once = SFT(offline.lm, offline.sgd())
    offline.fit(once, offline.Batches(numbered), 1, accumulate=2, limit_val_batches=0)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, once.state_dict()[name])


def test_numbers_are_those_of_the_tensors() -> None:
    double = torch.tensor([[0.1, 2.0]], dtype=torch.float64)
    read = numbers(a=torch.tensor(3), b=double, c=[torch.tensor(1.5), torch.tensor([-2.0, 4.0])], d=[], e=double[:, :0])
    assert read == {"a": [3.0], "b": [0.1, 2.0], "c": [1.5, -2.0, 4.0], "d": [], "e": []}
    assert numbers(a=[]) == {"a": []}


@quiet_lightning
def test_a_number_is_logged_without_the_device() -> None:
    """Lightning would make a tensor on the device of it: on `meta` that has no value."""
    logged: dict[str, float] = {}

    class Elsewhere(SFT):
        elsewhere = False

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("meta" if self.elsewhere else "cpu")

        def on_train_batch_end(self, *_: Any) -> None:
            self.elsewhere = True
            self.log("here", 0.25)
            self.elsewhere = False
            logged["here"] = float(self.trainer.callback_metrics["here"])

    offline.fit(Elsewhere(offline.lm, offline.sgd()), offline.Batches([GROUPS]), 1, limit_val_batches=0)
    assert logged == {"here": 0.25}


def test_the_pretended_device_counts() -> None:
    value = torch.tensor([1.0, -1.0]).as_subclass(OnDevice)
    for read in (lambda: (value * 2).sum().item(), lambda: value[value > 0], lambda: bool((value > 0).all())):
        OnDevice.reads = []
        read()
        assert len(OnDevice.reads) == 1
    OnDevice.reads = []
    torch.nn.functional.softmax(value[torch.tensor([0, 1])], 0).where(value > 0, 0.0)
    assert not OnDevice.reads
