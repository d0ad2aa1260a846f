"""Online DPO: which response is preferred, one update against plain DPO, ties, microbatches, ranks, judges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.testing import assert_close

from rlhf_lightning import DPO, OnlineDPO
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.ops.groups import Group
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit, offline

EOS = 2


def load(dtype: torch.dtype = torch.float64, **changes: object) -> Any:
    return bandit.load(**changes).to(dtype)


def build(loader: Any = load, lr: float = 0.5, **options: Any) -> OnlineDPO:
    settings: dict[str, Any] = {"reward": by_ids, "max_new_tokens": 4, "missing_eos_penalty": 0.5}
    return OnlineDPO(loader, offline.sgd(lr), **(settings | options))


def by_ids(prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
    return [sum(map(int, text.split())) % 4 / 2 for text in responses]


class Script(Engine):
    """An engine of made-up responses that keeps every rollout as (prompt, responses)."""

    def __init__(self) -> None:
        self.random, self.rollouts = random.Random(5), list[list[tuple[list[int], list[list[int]]]]]()

    def start(self, *_: Any) -> None: ...

    def close(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], n: int, **_: Any) -> Generations:
        rollout = [(list(prompt), [self.response() for _ in range(n)]) for prompt in prompts]
        self.rollouts.append(rollout)
        responses = [y for _, ys in rollout for y in ys]
        return Generations(responses, [y[-1] == EOS for y in responses])

    def response(self) -> list[int]:
        ids = [self.random.randrange(3, 16) for _ in range(self.random.randint(1, 4))]
        return [*ids[:-1], EOS] if self.random.random() < 0.5 else ids


def expected_score(ids: Sequence[int]) -> float:
    return sum(ids) % 4 / 2 - 0.5 * (ids[-1] != EOS)


def by_hand(rollout: list[tuple[list[int], list[list[int]]]], pairs: str) -> list[Group]:
    """The rows of preferences that a rollout stands for."""
    groups = []
    for prompt, responses in rollout:
        scores = [expected_score(y) for y in responses]
        order = sorted(set(scores), reverse=True)
        ranks = [order.index(score) for score in scores]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        chosen = range(len(responses)) if pairs == "all" else (best, worst) if best != worst else (0, 1)
        groups.append(Group(prompt, [responses[k] for k in chosen], ranks=[ranks[k] for k in chosen]))
    return groups


@pytest.mark.parametrize(
    "options",
    [
        {"num_generations": 2, "beta": 0.3},
        {"num_generations": 4, "loss": "ipo"},
        {"num_generations": 4, "pairs": "all", "beta": 0.3, "microbatch_tokens": 20},
    ],
    ids=["pairs", "best against worst", "all pairs"],
)
@quiet_lightning
def test_an_iteration_is_a_step_of_dpo_on_its_own_responses(options: dict[str, Any]) -> None:
    """Three iterations, so that policy and reference differ; in float64 equal to 1e-6 and far below."""
    script = Script()
    module = build(engine=script, max_grad_norm=0.0, **options)
    rows = bandit.fit(module, bandit.Prompts(3, size=6)).rows
    dpo = DPO(load, offline.sgd(0.5), **{k: v for k, v in options.items() if k in ("beta", "loss")})
    groups = [by_hand(rollout, options.get("pairs", "extremes")) for rollout in script.rollouts]
    assert options["num_generations"] > 2 or any(max(g.ranks or ()) == 0 for part in groups for g in part)
    dpo.configure_model()
    optimizer = torch.optim.SGD(dpo.policy.parameters(), lr=0.5)
    for row, part in zip(rows, groups, strict=True):
        ((batch,),) = (offline.Batches(train=[part]).train,)
        optimizer.zero_grad()
        losses = dpo.losses(batch, "train")
        losses.mean().backward()
        optimizer.step()
        decided = [max(g.ranks or ()) > 0 for g in part]
        assert row["online_dpo/ties"] == pytest.approx(1 - sum(decided) / len(part))
        assert row["policy/loss"] == pytest.approx(losses.sum().item() / sum(decided), abs=1e-6)
    for name, weight in dpo.policy.lm.state_dict().items():
        assert_close(module.policy.lm.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert not torch.equal(load().state_dict()["lm_head.weight"], dpo.policy.lm.state_dict()["lm_head.weight"])


def attached(**options: Any) -> OnlineDPO:
    """A module that believes in a Trainer of one process."""
    module = build(**options)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.configure_model()
    return module


def rollout_of(
    responses: list[list[int]], scores: list[float], finished: Sequence[bool] = (), texts: Sequence[str] = ()
) -> Rollout:
    """The responses to one prompt, with reference log-probabilities of -1 a token."""
    made = Rollout(
        [Group([1, 3], responses)], len(responses), torch.tensor(list(finished or [True] * len(responses))),
        torch.tensor(scores), "packed", torch.device("cpu"), 4096,
        texts=list(texts or [" ".join(map(str, y)) for y in responses]),
    )  # fmt: skip
    made.tokens["ref_logprobs"] = -torch.ones(made.mask.shape)
    return made


@quiet_lightning
def test_the_best_is_chosen_and_the_worst_rejected() -> None:
    module = attached(num_generations=3)
    found = module.preferences(rollout_of([[4], [5, 5], [6, 6, 6]], [0.0, -1.0, 2.0]))
    (group,) = found.groups
    assert (group.responses, group.ranks) == ([[6, 6, 6], [5, 5]], [0, 2])
    assert found.reference[0].tolist() == [-3.0, -2.0]
    assert found.metrics == {
        "online_dpo/ties": 0.0,
        "reward/chosen": 2.0,
        "rollout/chosen_length": 3.0,
        "reward/rejected": -1.0,
        "rollout/rejected_length": 2.0,
    }


@quiet_lightning
def test_the_penalty_of_a_missing_eos_comes_before_the_choice() -> None:
    """The better score belongs to the response that did not end; the metrics keep the scores of the reward."""
    rollout = rollout_of([[4], [5, 5]], [1.0, 0.8], finished=(False, True))
    found = attached(missing_eos_penalty=0.5).preferences(rollout)
    assert found.groups[0].responses == [[5, 5], [4]]
    assert found.metrics["reward/rejected"] == 1.0
    assert attached(missing_eos_penalty=0.1).preferences(rollout).groups[0].responses == [[4], [5, 5]]
    assert attached(missing_eos_score=0.9, missing_eos_penalty=5.0).preferences(rollout).groups[0].responses[0] == [4]


@pytest.mark.parametrize(
    ("scores", "texts"), [([0.5, 0.5], ("a", "b")), ([0.5, 0.1], ("a", "a "))], ids=["equal scores", "equal texts"]
)
@quiet_lightning
def test_no_preference_no_loss(scores: list[float], texts: tuple[str, str]) -> None:
    module = attached()
    found = module.preferences(rollout_of([[4], [5, 5]], scores, texts=texts))
    assert not found.exists(0)
    assert found.metrics["online_dpo/ties"] == 1.0
    losses = module.losses(offline.Batches(train=[found.groups]).train[0], found.reference[0].double(), found.scores[0])
    assert losses.tolist() == [0.0]
    assert module.reduced("update")[0] == dict.fromkeys(
        ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"), 0.0
    )


@quiet_lightning
def test_prompts_without_a_preference_move_nothing() -> None:
    module = build(reward=lambda p, r, m: [1.0] * len(r), missing_eos_penalty=0.0)
    rows = bandit.fit(module, bandit.Prompts(2, size=3)).rows
    assert all(torch.equal(v, load().state_dict()[k]) for k, v in module.policy.lm.state_dict().items())
    assert [(row["online_dpo/ties"], row["optim/grad_norm"]) for row in rows] == [(1.0, 0.0)] * 2


@quiet_lightning
def test_a_prompt_without_a_preference_counts_in_the_mean() -> None:
    """Twice the prompts, half of them without a preference: half the gradient."""
    by_prompt = {"3": [1.0, 0.0], "4": [1.0, 1.0]}

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
        return [by_prompt[prompt.split(", ")[1]][i % 2] for i, prompt in enumerate(prompts)]

    class Fixed(Script):
        def response(self) -> list[int]:
            self.last = [5, EOS] if getattr(self, "last", None) != [5, EOS] else [6, EOS]
            return self.last

    norms = [
        bandit.fit(build(reward=reward, engine=Fixed(), max_grad_norm=0.0), bandit.Prompts(1, size=size)).rows[0]
        for size in (1, 2)
    ]
    assert norms[1]["optim/grad_norm"] == pytest.approx(norms[0]["optim/grad_norm"] / 2)
    assert norms[1]["online_dpo/ties"] == 0.5
    assert norms[1]["policy/loss"] == pytest.approx(norms[0]["policy/loss"])  # of the prompts with a preference


@quiet_lightning
def test_microbatches_change_memory_not_results() -> None:
    whole, parts = (build(microbatch_tokens=tokens, engine=Script()) for tokens in (4096, 10))
    first, second = (bandit.fit(module, bandit.Prompts(2, size=5)).rows[-1] for module in (whole, parts))
    assert first == pytest.approx(second, rel=1e-9, abs=1e-9)
    assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=1e-12)


@quiet_lightning
def test_minibatches_are_updates_of_their_own() -> None:
    module, seen = build(num_minibatches=3, engine=Script()), list[list[int]]()
    module.make_schedule = partial(schedule, shape="linear", final=0.0)
    update = module.minibatch

    def watched(rollout: Any, preferences: Any, places: list[int], *rest: Any, **options: Any) -> float:
        seen.append(places)
        return update(rollout, preferences, places, *rest, **options)

    module.minibatch = watched
    rows = bandit.fit(module, bandit.Prompts(2, size=7)).rows
    assert sorted(place for part in seen[:3] for place in part) == list(range(7))
    assert [row["online_dpo/updates"] for row in rows] == [3, 6]
    assert [row["optim/lr"] for row in rows] == pytest.approx([0.25, 0.0])


@quiet_lightning
def test_a_judge_compares_instead_of_scoring() -> None:
    """It prefers the shorter response, whatever the score; in validation, of one response, the score is reported."""
    asked: list[tuple[int, int]] = []

    class Judge:
        def __call__(self, prompts: Any, responses: Any, metadata: Any) -> list[float]:
            return [7.0] * len(responses)

        def compare(self, prompts: Any, pairs: Any, metadata: Any) -> torch.Tensor:
            asked.append((len(prompts), len(metadata)))
            return torch.tensor([float(len(a) < len(b)) if len(a) != len(b) else 0.5 for a, b in pairs])

    module = build(reward=Judge(), engine=Script(), missing_eos_penalty=0.0)
    history = bandit.fit(module, bandit.Prompts(1, size=8, val=True))
    (row,) = history.rows
    assert row["rollout/chosen_length"] < row["rollout/rejected_length"]
    assert (row["reward/chosen"], row["reward/rejected"], row["reward/proxy"]) == (1.0, 0.0, 0.5)
    assert asked[0][0] == asked[0][1] <= 8
    assert len(asked) == 1
    assert history.validation["val/reward"] == 7.0


@quiet_lightning
def test_soft_labels_are_the_probabilities_that_scores_and_judges_say() -> None:
    class Judge:
        def compare(self, *_: Any) -> Any: ...

    groups = [Group([1, 3], [[4], [5, 5]], ranks=[0, 1])]
    for reward, gap, probability in ((by_ids, 1.5, torch.tensor(1.5).sigmoid()), (Judge(), 0.6, torch.tensor(0.8))):
        module, batch = attached(labels="soft", beta=0.3, reward=reward), offline.Batches(train=[groups]).train[0]
        reference, scores = torch.tensor([-2.0, -7.0]).double(), torch.tensor([gap, 0.0])
        logprobs = torch.stack([offline.response_logprob(module.policy.lm, [1, 3], y).sum() for y in ([4], [5, 5])])
        h = 0.3 * ((logprobs - reference)[0] - (logprobs - reference)[1])
        expected = -probability * h.sigmoid().log() - (1 - probability) * (-h).sigmoid().log()
        assert_close(module.losses(batch, reference, scores), expected[None], check_dtype=False)
    assert attached(reward=Judge()).probability(torch.tensor([1.5])).tolist() == [1.0]  # with a penalty


@quiet_lightning
def test_dropout_is_found_at_the_start() -> None:
    with pytest.raises(UserError, match=r"log pi and log pi_ref differ by .* switch off dropout"):
        bandit.fit(build(partial(load, attention_dropout=0.5)), bandit.Prompts(1))


@pytest.mark.slow
@quiet_lightning
def test_a_rewarded_token_becomes_likely() -> None:
    options = {"reward": bandit.good_share, "missing_eos_penalty": 0.0, "max_new_tokens": 4}
    rows = bandit.fit(OnlineDPO(bandit.load, offline.adam(3e-2), **options), bandit.Prompts(12)).rows
    assert rows[-1]["reward/proxy"] > 0.7 > 0.2 > rows[0]["reward/proxy"]


@pytest.mark.slow
@quiet_lightning
def test_the_reference_of_an_adapter_is_the_policy_without_it() -> None:
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    module = OnlineDPO(partial(load, torch.float32), offline.adam(3e-2), lora=lora, reward=by_ids, max_new_tokens=4)
    rows = bandit.fit(module, bandit.Prompts(4)).rows
    assert module.reference is None
    assert rows[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl/reference"] > 1e-3


def first_five_are_equal(prompts: Sequence[str], responses: Sequence[str], metadata: Any) -> list[float]:
    return [
        0.0 if row["row"] < 5 else float(sum(map(int, text.split())) % 7)
        for text, row in zip(responses, metadata, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.dist
@quiet_lightning
def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    """Of five and eleven prompts; the first rank's have no preferences."""
    for ranks in (1, 2):
        module = OnlineDPO(
            load,
            offline.sgd(0.5),
            reward=first_five_are_equal,
            max_new_tokens=4,
            missing_eos_penalty=0.0,
            microbatch_tokens=24,
        )
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=ranks, strategy="ddp_spawn" if ranks > 1 else "auto",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, limit_val_batches=0, callbacks=[bandit.KeepWeights(tmp_path / f"{ranks}.pt")],
        )  # fmt: skip
        trainer.fit(module, bandit.Split(3))
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert_close(two, one, rtol=0, atol=1e-9)
    assert not torch.equal(one["policy.lm.lm_head.weight"], load().state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "online_dpo compares responses to one prompt: num_generations=1 must be at least 2"),
        ({"loss": "ipa"}, r"online_dpo\.loss='ipa' is not one of sigmoid, ipo\. Did you mean 'ipo'"),
        ({"labels": "sof"}, "Did you mean 'soft'"),
        ({"pairs": "extreme"}, "Did you mean 'extremes'"),
        ({"beta": 0.0}, r"online_dpo\.beta=0.0 is not a finite number in \(0, inf\)"),
        ({"num_minibatches": 0}, r"online_dpo\.num_minibatches=0 "),
        ({"missing_eos_penalty": float("nan")}, r"online_dpo\.missing_eos_penalty=nan "),
        ({"engine": LocalEngine(top_p=0.5)}, r"^sampler\.top_p=0.5: "),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_beta_is_that_of_the_loss() -> None:
    assert (build().beta, build(loss="ipo").beta, build(loss="ipo", beta=0.2).beta) == (0.1, 0.5, 0.2)
