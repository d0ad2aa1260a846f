"""Reference and reward model on the CPU between the phases that need them: the same results, and when they move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning import OnlineDPO
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.modules.ppo import PPO
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit, offline


class Model:
    """A reward with a model, which says where it is and fails in one call."""

    def __init__(self, fails_in: int = -1) -> None:
        self.frozen, self.calls, self.fails_in = Frozen(nn.Linear(1, 1)), 0, fails_in

    def to(self, device: torch.device | str) -> Model:
        self.frozen.to(device)
        return self

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.fails_in:
            raise RuntimeError("the reward failed")
        return bandit.good_share(prompts, responses, metadata)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What moves where. The device of the module, here the CPU as well, is a torch.device; "cpu" is a text."""
    found: list[tuple[str, str]] = []

    def to(self: Frozen[Any], device: Any) -> Frozen[Any]:
        place = "device" if isinstance(device, torch.device) else device
        found.append(("reward" if isinstance(self.model, nn.Linear) else "reference", place))
        return self

    monkeypatch.setattr(Frozen, "to", to)
    return found


def build(kind: str, **options: Any) -> Any:
    if kind == "ppo":
        return bandit.build(num_generations=2, **options)
    return OnlineDPO(bandit.load, offline.adam(), **({"max_new_tokens": 4} | options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "online_dpo"])
@quiet_lightning
def test_results_are_the_same_and_each_moves_for_its_phase(kind: str, moves: list[tuple[str, str]]) -> None:
    runs = {}
    for offload in (False, True):
        moves.clear()
        module = build(kind, reward=Model(), gold=bandit.good_share, offload=offload)
        rows = bandit.fit(module, bandit.Prompts(3)).rows
        runs[offload] = rows, bandit.weights(module)
        if not offload:
            assert moves == [("reference", "device"), ("reward", "device")]
    iteration = [("reward", "device"), ("reward", "cpu"), ("reference", "device"), ("reference", "cpu")]
    assert moves == [("reference", "cpu"), ("reward", "cpu"), *3 * iteration]
    (rows, weights), (expected, others) = runs[True], runs[False]
    assert rows == expected
    assert all(torch.equal(weights[name], others[name]) for name in others)


@quiet_lightning
def test_after_an_error_everything_is_back_on_the_cpu(moves: list[tuple[str, str]]) -> None:
    module = build("ppo", reward=Model(fails_in=2), offload=True)
    with pytest.raises(UserError, match="the reward failed"):
        bandit.fit(module, bandit.Prompts(3))
    assert moves[-2:] == [("reward", "device"), ("reward", "cpu")]


@quiet_lightning
def test_gradients_are_gone_when_the_next_iteration_samples() -> None:
    """They are as large as the weights, and the key-value cache may use their memory."""
    seen = []

    class Watched(PPO):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(sum(p.grad is not None for p in self.parameters()))
            return super().generate(*args, **kwargs)

    settings: dict[str, Any] = {"reward": bandit.good_share, "max_new_tokens": 4}
    bandit.fit(Watched(bandit.load, offline.adam(), **settings), bandit.Prompts(3))
    assert seen == [0, 0, 0]


def test_what_comes_back_is_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move to the CPU copies once; later ones put the copy in its place, also after a move that ended half way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    model[1].running_mean.fill_(0.5)
    frozen, x = Frozen(model), torch.randn(5, 3, dtype=torch.float64)
    expected, given = frozen(x), model[0].weight.data_ptr()
    assert frozen.to("cpu") is frozen
    assert model[0].weight.data_ptr() == given  # it was there
    monkeypatch.setattr(Frozen, "device", property(lambda self: torch.device("cuda", 0)))
    assert frozen.to("cuda").to(torch.device("cuda", 0)) is frozen
    assert model[0].weight.data_ptr() == given
    places = []
    for _ in range(2):
        frozen.to("cpu")
        assert torch.equal(frozen(x), expected)
        places.append([tensor.data_ptr() for tensor in frozen.tensors()])
        model[0].weight.data = torch.zeros_like(model[0].weight)  # as if on the accelerator, others not yet
        model[1].running_mean.data = torch.zeros(4).double()
    assert places[0] == places[1]
    assert len(places[0]) == 4 + 3
    assert given not in places[0]


def test_offload_without_anything_to_move_is_refused() -> None:
    with pytest.raises(UserError, match="offload=true has nothing to move: with an adapter"):
        bandit.build(lora={"r": 2}, offload=True)
    bandit.build(lora={"r": 2}, offload=True, reward=Model())
    bandit.build(offload=True)
