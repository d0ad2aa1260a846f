"""PPO, RLOO and GRPO once more: every number a run logs and every weight it leaves, from plain forward passes.

The responses are made up, so that the same run can be computed twice: by the module, and here in float64, one response
at a time, without packing, padding or masks.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.ops.groups import Group, GroupList
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Prompts, build, fit, load, load_critic, weights

SIZE, ITERATIONS, EOS, LR = 3, 2, 2, 0.5
PTX = [([1, 4], [[9, 10, 11, EOS], [12, EOS]]), ([1, 5], [[13, EOS]]), ([1, 6, 3], [[8, 9, 7, EOS]])]
COMMON: dict[str, Any] = {
    "estimator": "gae", "load_critic": None, "critic_lr": None, "num_generations": 2, "ppo_epochs": 2, "num_minibatches": 1,
    "temperature": 0.7, "microbatch_tokens": 4096, "clip_low": 0.05, "clip_high": 0.1, "value_clip": 0.1, "gamma": 0.9,
    "lam": 0.8, "critic_lam": 0.6, "critic_warmup": 0, "critic_refit": None, "vf_coef": 0.3, "entropy_coef": 0.2, "ptx_coef": 0.0, "kl_beta": 0.1, "kl_target": None, "kl_horizon": 40,
    "kl_estimator": "k1", "kl_in": "reward", "whiten_advantages": True, "whiten_rewards": False, "reward_scale": False,
    "reward_clip": None, "missing_eos_penalty": 0.5, "missing_eos_score": None, "max_grad_norm": 1e9,
    "loss_type": "dapo", "scale_rewards": True, "max_new_tokens": 4,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "ppo with a value head": {"ptx_coef": 0.25, "kl_target": 0.5, "max_grad_norm": 0.3, "critic_lr": 0.5},
    "ppo whose critic begins": {"ptx_coef": 0.25, "kl_target": 0.5, "critic_warmup": 1, "critic_lr": 0.2},
    "ppo whose critic model begins": {
        "load_critic": load_critic, "critic_lr": 0.2, "critic_warmup": 1, "microbatch_tokens": 12,
    },
    "ppo with a critic": {
        "load_critic": load_critic, "critic_lr": 0.1, "whiten_rewards": True, "reward_scale": True, "reward_clip": 0.8,
        "kl_estimator": "k3", "microbatch_tokens": 12, "missing_eos_score": -0.4,
    },
    "ppo without clipping of values": {
        "load_critic": load_critic, "value_clip": None, "temperature": 1.0, "critic_lr": 0.3, "max_grad_norm": 0.3,
    },
    "ppo with a value head that is refitted": {"critic_refit": 2.0, "critic_lr": 0.2},
    "ppo with a critic that is refitted": {
        "load_critic": load_critic, "critic_refit": 0.5, "critic_lr": 0.1, "critic_warmup": 1, "microbatch_tokens": 12,
    },
    "ppo in num_minibatches": {"num_minibatches": 2, "ppo_epochs": 1, "critic_lr": 0.5, "kl_target": 0.5, "kl_horizon": None},
    "rloo": {
        "estimator": "rloo", "num_generations": 3, "kl_estimator": "k2", "ptx_coef": 2.0, "microbatch_tokens": 12,
        "whiten_advantages": None,
    },
    "grpo, k2 in the loss": {
        "estimator": "grpo", "kl_in": "loss", "kl_estimator": "k2", "kl_target": 1e-4, "loss_type": "grpo",
        "microbatch_tokens": 12, "whiten_advantages": None,
    },
    "grpo, k3 in the loss": {
        "estimator": "grpo", "kl_in": "loss", "kl_estimator": "k3", "kl_beta": 0.5, "whiten_advantages": None,
    },
    "dr. grpo": {
        "whiten_advantages": None, "estimator": "grpo", "loss_type": "dr_grpo", "scale_rewards": False, "kl_beta": 0.0, "max_new_tokens": 6,
        "microbatch_tokens": 12,
    },
}  # fmt: skip


class Script(Engine):
    """An engine of made-up responses that keeps every rollout as (prompt, response) pairs."""

    def __init__(self) -> None:
        self.random = random.Random(5)
        self.rollouts: list[list[tuple[list[int], list[int]]]] = []

    def start(self, *_: Any) -> None: ...

    def close(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], n: int, **_: Any) -> Generations:
        responses = [self.response() for _ in range(n * len(prompts))]
        self.rollouts.append([(list(prompts[i // n]), y) for i, y in enumerate(responses)])
        return Generations(responses, [y[-1] == EOS for y in responses])

    def response(self) -> list[int]:
        ids = [self.random.randrange(3, 16) for _ in range(self.random.randint(1, 4))]
        return [*ids[:-1], EOS] if self.random.random() < 0.5 else ids


def score(ids: Sequence[int]) -> float:
    return sum(ids) % 7 / 2 - 1


def by_ids(prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
    return [score([int(i) for i in text.split()]) for text in responses]


def by_length(prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
    return [float(len(text.split())) for text in responses]


# ---- the same by hand ----------------------------------------------------------------------------------------------


def k(kind: str, new: Tensor, ref: Tensor) -> Tensor:
    x = new - ref
    return {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}[kind]


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()


class ByHand:
    """A policy, its reference and its critic, and one iteration after the other."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.o = options
        self.policy, self.reference = load().double(), load().double()
        self.critic = options["load_critic"]().double() if options["load_critic"] else None
        self.head = torch.nn.Linear(16, 1).double() if options["estimator"] == "gae" and not self.critic else None
        if self.critic is not None and options["critic_refit"] is not None:
            self.critic.score = torch.nn.Linear(16, 1).double()
            for parameter in self.critic.score.parameters():
                torch.nn.init.zeros_(parameter)
        valued = self.critic or self.head
        groups: list[dict[str, Any]] = [{"params": [*self.policy.parameters()]}]
        if valued is not None:
            groups += [{"params": [*valued.parameters()], "lr": options["critic_lr"]}]
        if self.head is not None:
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)
        self.trained = [group["params"] for group in groups]
        self.optimizer = torch.optim.SGD(groups, lr=LR)
        self.beta, self.scores, self.episodes, self.updates = options["kl_beta"], [], 0, 0
        self.warming = options["critic_warmup"]  # iterations left in which the critic learns alone

    def tokens(self, lm: Any, prompt: list[int], y: list[int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, entropies and hidden states of the positions that predict `y`, each (T,)."""
        hidden = lm.model(torch.tensor([[*prompt, *y]])).last_hidden_state[0, len(prompt) - 1 : -1]
        logprobs = (lm.lm_head(hidden) / temperature).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(y)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1), hidden

    def read(self, pairs: list[tuple[list[int], list[int]]], lm: Any) -> list[list[Tensor]]:
        """Return log-probabilities, entropies and values of every response, and the states that these are of."""
        columns = []
        for prompt, y in pairs:
            logprobs, entropy, hidden = self.tokens(lm, prompt, y, self.o["temperature"])
            values = torch.zeros(len(y)).double()
            if self.critic is not None:
                states = self.critic.model(torch.tensor([[*prompt, *y]])).last_hidden_state
                values = self.critic.score(states)[0, len(prompt) - 1 : -1, 0]
            elif self.head is not None:
                values = self.head(hidden)[:, 0]
            columns.append(
                [logprobs, entropy, values, hidden if self.critic is None else states[0, len(prompt) - 1 : -1]]
            )
        return [list(column) for column in zip(*columns, strict=True)]

    def shaped(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        scores = [score(y) for _, y in pairs]
        fixed = self.o["missing_eos_score"]
        if self.o["reward_scale"]:
            self.scores += [s for s, (_, y) in zip(scores, pairs, strict=True) if fixed is None or y[-1] == EOS]
            deviation = torch.tensor(self.scores).double().std(correction=0).item()
            scores = [s / deviation for s in scores]
        if (limit := self.o["reward_clip"]) is not None:
            scores = [min(max(s, -limit), limit) for s in scores]
        if fixed is not None:
            return [s if y[-1] == EOS else fixed for s, (_, y) in zip(scores, pairs, strict=True)]
        return [s - self.o["missing_eos_penalty"] * (y[-1] != EOS) for s, (_, y) in zip(scores, pairs, strict=True)]

    def gae(self, rewards: Tensor, values: Tensor, lam: float) -> Tensor:
        delta = rewards + self.o["gamma"] * torch.cat([values[1:], values.new_zeros(1)]) - values
        decay = self.o["gamma"] * lam
        return torch.stack([sum(decay**i * d for i, d in enumerate(delta[t:])) for t in range(len(delta))])

    def advantages(self, rewards: list[Tensor], values: list[Tensor], lam: float) -> Tensor:
        lengths = [len(r) for r in rewards]
        if self.o["estimator"] == "gae":
            if self.o["whiten_rewards"]:
                flat = torch.cat(rewards)
                rewards = list((whiten(flat) + flat.mean()).split(lengths))
            return torch.cat([self.gae(r, v, lam) for r, v in zip(rewards, values, strict=True)])
        n, totals, advantages = self.o["num_generations"], [r.sum() for r in rewards], []
        for i, total in enumerate(totals):
            prompt = torch.stack(totals[i // n * n : i // n * n + n])
            if self.o["estimator"] == "rloo":
                advantages.append(total - (prompt.sum() - total) / (n - 1))
            else:
                scale = prompt.std() + 1e-4 if self.o["scale_rewards"] else 1.0
                advantages.append((total - prompt.mean()) / scale)
        return torch.cat([a.expand(length) for a, length in zip(advantages, lengths, strict=True)])

    def iteration(self, pairs: list[tuple[list[int], list[int]]], updates: list[list[int]]) -> dict[str, float]:
        """Return the metrics of an iteration whose updates are made from the responses to the given prompts each."""
        o = self.o
        with torch.no_grad():
            old, _, old_values, states = self.read(pairs, self.policy)
            ref = self.read(pairs, self.reference)[0]
        kls = [k(o["kl_estimator"], a, b) for a, b in zip(old, ref, strict=True)]
        rewards = [-(self.beta if o["kl_in"] == "reward" else 0.0) * kl for kl in kls]
        for reward, shaped in zip(rewards, self.shaped(pairs), strict=True):
            reward[-1] += shaped
        kl = sum(x.sum().item() for x in kls) / len(pairs)
        proxies = torch.tensor([score(y) for _, y in pairs]).double()
        self.episodes += len(pairs)
        metrics = {
            "reward/proxy": proxies.mean().item(),
            "reward/proxy_std": proxies.std(correction=0).item(),
            "reward/total": sum(r.sum().item() for r in rewards) / len(pairs),
            "reward/gold": sum(len(y) for _, y in pairs) / len(pairs),
            "kl/reference": kl,
            "kl/beta": self.beta,
            "rollout/length": sum(len(y) for _, y in pairs) / len(pairs),
            "rollout/ended_with_eos": sum(y[-1] == EOS for _, y in pairs) / len(pairs),
            "rollout/episodes": self.episodes,
            "optim/lr": LR,
        }
        advantages, values = self.advantages(rewards, old_values, o["lam"]), torch.cat(old_values)
        returns = self.advantages(rewards, old_values, o["critic_lam"]) + values
        self.limit = math.inf  # how far a value may move
        if o["estimator"] == "gae":
            outcomes = self.advantages(rewards, [torch.zeros(len(v)) for v in old_values], 1.0)
            metrics["value/explained_variance"] = (1 - (outcomes - values).var() / outcomes.var()).item()
            metrics["optim/critic_lr"] = o["critic_lr"]
            if o["value_clip"] is not None and not self.warming:
                self.limit = o["value_clip"] * returns.std(correction=0).item()
        if o["whiten_advantages"]:
            advantages = whiten(advantages)
        lengths = [len(y) for _, y in pairs]
        if o["critic_refit"] is not None:
            values = self.refit(torch.cat(states), values, returns, len(pairs))
            old_values = list(values.split(lengths))
        columns = [old, ref, advantages.split(lengths), old_values, returns.split(lengths)]
        rows, ratios = [], []
        for number, chosen in enumerate(updates):
            ptx = PTX[len(PTX) * number // len(updates) : len(PTX) * (number + 1) // len(updates)]
            responses = [i for i in range(len(pairs)) if i // o["num_generations"] in chosen]
            part = [torch.cat([column[i] for i in responses]) for column in columns]
            row, ratio = self.update([pairs[i] for i in responses], ptx, *part)
            rows.append(row)
            ratios.append(ratio)
        self.updates += len(rows)
        for name in {name for row in rows for name in row}:
            logged = [row[name] for row in rows if name in row]
            metrics[name] = sum(logged) / len(logged)
        metrics |= {"ppo/updates": self.updates, "ppo/epochs": o["ppo_epochs"]}
        metrics |= {
            "policy/ratio_min": torch.cat(ratios).min().item(),
            "policy/ratio_max": torch.cat(ratios).max().item(),
        }
        if o["kl_target"] is not None and not self.warming:
            error = min(max(kl / o["kl_target"] - 1, -0.2), 0.2)
            self.beta *= 1 + error * (len(pairs) / o["kl_horizon"] if o["kl_horizon"] else 0.1)
        self.warming = max(self.warming - 1, 0)
        return metrics

    @torch.no_grad()
    def refit(self, x: Tensor, values: Tensor, returns: Tensor, responses: int) -> Tensor:
        """Change the head by a regression of what it leaves unexplained, and return the new values.

        The prior is rows of data: each says that a weight does not change.
        """
        centered, y = x - x.mean(0), returns - values
        prior = self.o["critic_refit"] * len(x) / responses * centered.square().mean()
        rows = torch.cat([centered, prior.sqrt() * torch.eye(16).double()])
        change = torch.linalg.lstsq(rows, torch.cat([y - y.mean(), torch.zeros(16)])[:, None]).solution[:, 0]
        shift = (y - x @ change).mean()
        head = self.head or self.critic.score
        head.weight += change
        head.bias += shift
        return head(x)[:, 0]

    def mean(self, pairs: Any, losses: Tensor) -> Tensor:
        """Return the mean over tokens, or over responses of their means, or of their sums by the longest possible."""
        parts = losses.split([len(y) for _, y in pairs])
        if self.o["loss_type"] == "dapo":
            return losses.mean()
        longest = self.o["max_new_tokens"]
        means = [part.mean() if self.o["loss_type"] == "grpo" else part.sum() / longest for part in parts]
        return torch.stack(means).mean()

    def update(
        self, pairs: Any, ptx: Any, old: Tensor, ref: Tensor, advantages: Tensor, old_values: Tensor, returns: Tensor
    ) -> tuple[dict[str, float], Tensor]:
        """Make one update and return its metrics and ratios."""
        o = self.o
        new, entropy, values, _ = (torch.cat(column) for column in self.read(pairs, self.policy))
        ratio = (new - old).exp()
        plain, clipped = ratio * advantages, ratio.clamp(1 - o["clip_low"], 1 + o["clip_high"]) * advantages
        losses = -torch.minimum(plain, clipped)
        row = {"policy/loss": losses.mean(), "policy/clip_fraction": (clipped < plain).double().mean()}
        row |= {"policy/entropy": entropy.mean(), "kl/old": k("k3", old, new).mean()}
        losses = losses - o["entropy_coef"] * entropy
        if o["kl_in"] == "loss":
            losses = losses + self.beta * k(o["kl_estimator"], new, ref)
        loss = torch.zeros(()) if self.warming else self.mean(pairs, losses)
        if o["estimator"] == "gae":
            errors = (values - returns) ** 2
            limited = (old_values + (values - old_values).clamp(-self.limit, self.limit) - returns) ** 2
            more = limited > errors + 1e-9  # without a limit rounding makes a difference
            row |= {
                "value/loss": torch.maximum(errors, limited).mean() / 2,
                "value/clip_fraction": more.double().mean(),
            }
            loss = loss + o["vf_coef"] * row["value/loss"]
        if o["ptx_coef"] and ptx and not self.warming:
            text = torch.cat([self.tokens(self.policy, prompt, y, 1.0)[0] for prompt, ys in ptx for y in ys])
            row["policy/ptx_loss"] = -text.mean()
            loss = loss - o["ptx_coef"] * text.mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.warming:
            for parameter in self.policy.parameters():
                parameter.grad = None
        for name, trained in zip(("optim/grad_norm", "optim/critic_grad_norm"), self.trained, strict=False):
            row[name] = torch.nn.utils.clip_grad_norm_(trained, o["max_grad_norm"])
        self.optimizer.step()
        return {name: value.item() for name, value in row.items()}, ratio.detach()

    def validation(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
        with torch.no_grad():
            logprobs, ref = (torch.cat(self.read(pairs, lm)[0]) for lm in (self.policy, self.reference))
        sums = {
            "val/reward": sum(score(y) for _, y in pairs),
            "val/gold": sum(len(y) for _, y in pairs),
            "val/length": sum(len(y) for _, y in pairs),
            "val/ended_with_eos": sum(y[-1] == EOS for _, y in pairs),
            "val/kl": (logprobs - ref).sum().item(),
        }
        return {name: value / len(pairs) for name, value in sums.items()}


def orders(options: dict[str, Any]) -> list[list[list[int]]]:
    """Return every choice of prompts for the updates of an iteration: two num_minibatches are two prompts and then one."""
    epochs = options["ppo_epochs"]
    if options["num_minibatches"] == 1:
        return [[[*range(SIZE)]] * epochs]
    splits = [[[i for i in range(SIZE) if i != last], [last]] for last in range(SIZE)]
    return [[*itertools.chain(*chosen)] for chosen in itertools.product(splits, repeat=epochs)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@quiet_lightning
def test_a_run_by_hand(name: str) -> None:
    options, script = COMMON | RUNS[name], Script()
    module = build(reward=by_ids, gold=by_length, engine=script, **options)
    module.make_optimizer = partial(torch.optim.SGD, lr=LR)  # Adam would magnify rounding
    ptx = GroupList([Group(*text) for text in PTX]) if options["ptx_coef"] else None
    history = fit(module, Prompts(ITERATIONS, SIZE, ptx, val=True))
    hand = ByHand(options)
    assert len(script.rollouts) == ITERATIONS + 1
    for row, pairs in zip(history.rows, script.rollouts[:-1], strict=True):
        # the order of the prompts is random: the one that explains the logged loss must explain everything else
        attempts = [(made := copy.deepcopy(hand), made.iteration(pairs, order)) for order in orders(options)]
        hand, expected = min(attempts, key=lambda attempt: abs(attempt[1]["policy/loss"] - row["policy/loss"]))
        logged = {metric: value for metric, value in row.items() if not metric.startswith("val/")}
        assert logged == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < history.rows[-1]["policy/clip_fraction"] < 1  # else neither end of the ratio's range was tried
    assert history.validation == pytest.approx(hand.validation(script.rollouts[-1]), rel=1e-4, abs=1e-5)
    trained = weights(module)
    for part, made in (("policy.lm", hand.policy), ("policy.value_head", hand.head), ("critic.model", hand.critic)):
        for key, tensor in made.state_dict().items() if made is not None else ():
            ours = f"{part}.{key}"
            if options["critic_refit"] is not None:
                ours = ours.replace("critic.model.score", "critic.value_head")
            torch.testing.assert_close(trained[ours].double(), tensor, atol=1e-5, rtol=1e-4, msg=ours)
