"""The real PPO, RLOO, GRPO, DPO and online DPO modules, with a real decoder and sampler, end at ref * exp(r / beta) / Z.

Responses are the 64 strings of three tokens out of four, so policy and optimum are known exactly. The arithmetic alone
reaches it to the last digits in tests/ops/test_known_optimum.py; here everything between takes part: sampling, scoring,
masks, layouts, the critic, inner epochs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_lightning import DPO, OnlineDPO
from rlhf_lightning.modules.ppo import PPO
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.ops.groups import Group, GroupList, pack
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit, offline

BETA, PROMPT = 0.5, [0]
SPACE = list(itertools.product(range(4), repeat=3))
REWARD = torch.randn(len(SPACE), generator=torch.Generator().manual_seed(7)).double()


def load(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A decoder of four tokens, far from uniform, that can represent any distribution over the 64 responses."""
    torch.manual_seed(4)
    sizes = {"vocab_size": 4, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **special)).to(dtype)


@torch.no_grad()
def distribution(lm: Any) -> Tensor:
    """The exact log-probability of each of the 64 responses."""
    ids = torch.tensor([[*PROMPT, *y] for y in SPACE])
    logprobs = lm(ids).logits[:, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None]).sum((1, 2))


def optimum() -> Tensor:
    """ref * exp(r / beta) / Z."""
    return (distribution(load()) + REWARD / BETA).softmax(0)


def found_beta(logprobs: Tensor) -> float:
    """One over the slope of log(policy / reference) on the reward, over the responses of the reference."""
    reference = distribution(load())
    weights = reference.exp()
    rewards, ratios = (x - (weights * x).sum() for x in (REWARD, logprobs - reference))
    return ((weights * rewards**2).sum() / (weights * rewards * ratios).sum()).item()


def table(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    places = [int("".join(text.split()), 4) for text in responses]
    return REWARD[places]


class Endless(bandit.Ids):
    """Responses have three tokens and never end by themselves."""

    eos_ids = frozenset({99})


class Same(bandit.Prompts):
    """The one prompt, many times an iteration."""

    def __init__(self, iterations: int, size: int) -> None:
        super().__init__(iterations, 1)
        rows = [Group(PROMPT, [], index=i, text="") for i in range(size)]
        self.template, self.batches = Endless(), [GroupList(rows)] * iterations


OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"estimator": "gae", "value_clip": None, "ppo_epochs": 4, "max_grad_norm": 100.0},  # the critic lags
    "rloo": {"estimator": "rloo", "num_generations": 8},
    "grpo": {"estimator": "grpo", "num_generations": 64},
}
# responses of an iteration, iterations, and how far from the optimum it may end: measured 0.017 for RLOO, a beta that
# is wrong by a tenth 0.034. GRPO divides by a standard deviation that vanishes at the optimum, so where it ends is a
# matter of chance (0.02 and 0.09 for two seeds), but the slope of log(policy / reference) on the reward is not
SIZES = {"ppo": (1024, 150, 2e-2), "rloo": (512, 100, 3e-2), "grpo": (1024, 150, 0.1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["rloo", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("ppo", "grpo"))]
)
@quiet_lightning
def test_sampled_methods_reach_the_optimum(method: str) -> None:
    options, (size, iterations, limit) = OPTIONS[method], SIZES[method]
    module = PPO(
        load, partial(torch.optim.Adam, lr=3e-3), partial(schedule, shape="cosine", final=0.01), reward=table, kl_beta=BETA,
        max_new_tokens=3, missing_eos_penalty=0.0, microbatch_tokens=2000, **{"ppo_epochs": 2} | options,
    )  # fmt: skip
    bandit.fit(module, Same(iterations, size // options.get("num_generations", 1)))
    best, start = optimum(), distribution(load()).exp()
    logprobs = distribution(module.policy.lm)
    apart = 0.5 * (logprobs.exp() - best).abs().sum().item()
    print(method, apart, found_beta(logprobs))
    assert 0.5 * (start - best).abs().sum().item() > 0.4
    assert apart < limit
    assert found_beta(logprobs) == pytest.approx(
        BETA, rel=0.15
    )  # GRPO: 0.504 and 0.551 for two seeds, of beta 0.6 0.629


def test_the_slope_at_the_optimum_is_beta() -> None:
    assert found_beta(optimum().log()) == pytest.approx(BETA, rel=1e-9)
    assert found_beta((distribution(load()) + REWARD / (1.2 * BETA)).log_softmax(0)) == pytest.approx(1.2 * BETA)


class Once(LightningDataModule):
    """One batch, over and over."""

    def __init__(self, groups: list[Group], steps: int) -> None:
        super().__init__()
        self.rows, self.steps_per_epoch = {}, steps
        self.batch = pack(groups, 64)  # attention in short rows costs a fraction of that in long ones

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch] * self.steps_per_epoch, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.nightly
@pytest.mark.slow
@quiet_lightning
def test_dpo_on_exact_preferences_reaches_the_optimum() -> None:
    """Every response is compared with three others, with the Bradley-Terry probability as label."""
    groups = []
    for i, step in itertools.product(range(64), (1, 7, 25)):
        j = (i + step) % 64
        label = torch.sigmoid(REWARD[i] - REWARD[j]).item()
        groups.append(Group(PROMPT, [list(SPACE[i]), list(SPACE[j])], label=label))
    module = DPO(
        partial(load, torch.float64), offline.adam(3e-3), partial(schedule, shape="cosine", final=0.0), beta=BETA
    )
    offline.fit(module, Once(groups, 400), 400)
    implicit = BETA * (distribution(module.policy.lm) - distribution(load(torch.float64)))
    error = (implicit - implicit.mean()) - (REWARD - REWARD.mean())
    apart = 0.5 * (distribution(module.policy.lm).exp() - optimum()).abs().sum().item()
    print("dpo", error.abs().max().item(), apart)
    assert error.abs().max() < 2e-3
    assert apart < 1e-3


@pytest.mark.slow
@pytest.mark.nightly
@quiet_lightning
def test_online_dpo_reaches_the_optimum() -> None:
    """With Bradley-Terry labels the loss of every pair is least at the optimum, whoever sampled the pair."""
    module = OnlineDPO(
        load, partial(torch.optim.Adam, lr=1e-3), partial(schedule, shape="cosine", final=0.01), reward=table, beta=BETA,
        num_generations=16, pairs="all", labels="soft", max_new_tokens=3, missing_eos_penalty=0.0, microbatch_tokens=500,
    )  # fmt: skip
    bandit.fit(module, Same(400, 8))
    apart = 0.5 * (distribution(module.policy.lm).exp() - optimum()).abs().sum().item()
    print("online dpo", apart)
    assert apart < 7e-2  # measured 0.058 and still falling; a beta that is wrong by a quarter is 0.08 away
