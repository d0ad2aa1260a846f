"""Ensembles of rewards: their combination by hand, what is refused, and PPO, candidates and best of n on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.rewards.ensemble import aggregated, disagreement
from rlhf_lightning.rewards.scoring import load_reward, score, score_groups
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from tests.helpers.compose import composed
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Prompts, build, fit
from tests.modules.offline import start

NAN = math.nan
SCORES = torch.tensor([[1.0, -2.0, 4.0], [3.0, 2.0, 4.0], [5.0, 0.0, 4.0]])  # three members, three responses
TEXTS: tuple[Any, ...] = (["q", "q", "p"], ["a", "bbb", "cc"], [{}, {}, {}])


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(text)) for text in responses]


def twice(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [2.0 * len(text) for text in responses]


def some(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
    return [None if text == "a" else -1.0 for text in responses]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [3.0, 0.0, 4.0]),
        ("worst", [1.0, -2.0, 4.0]),
        ({"uwo": 0.0}, [3.0, 0.0, 4.0]),
        ({"uwo": 0.5}, [3 - 0.5 * 8 / 3, 0 - 0.5 * 8 / 3, 4.0]),  # variances 8/3, 8/3 and 0, with the divisor 3
        ({"uwo": 3}, [3 - 8.0, -8.0, 4.0]),
    ],
)
def test_combinations_by_hand(how: Any, expected: list[float]) -> None:
    assert aggregated(SCORES, how).tolist() == pytest.approx(expected)


def test_disagreement_is_the_standard_deviation_over_members() -> None:
    assert disagreement(SCORES).tolist() == pytest.approx([math.sqrt(8 / 3), math.sqrt(8 / 3), 0.0])
    assert disagreement(SCORES + 100.0).tolist() == pytest.approx(disagreement(SCORES).tolist(), abs=1e-5)


def test_a_member_without_a_score_does_not_count() -> None:
    scores = torch.tensor([[1.0, NAN, NAN], [3.0, 2.0, NAN], [NAN, 6.0, NAN]])
    assert aggregated(scores, "worst")[:2].tolist() == [1.0, 2.0]
    assert aggregated(scores, {"uwo": 1.0})[:2].tolist() == [2.0 - 1.0, 4.0 - 4.0]
    assert disagreement(scores)[:2].tolist() == [1.0, 2.0]
    assert all(aggregated(scores, how)[2].isnan() for how in ("mean", "worst", {"uwo": 1.0}))


def test_a_list_is_an_ensemble_that_tells_its_disagreement() -> None:
    reward = load_reward([length, twice], ensemble={"uwo": 2.0})
    found = score_groups(reward, *TEXTS)
    assert list(found) == ["", "disagreement"]
    assert found["disagreement"].tolist() == pytest.approx([0.5, 1.5, 1.0])
    assert found[""].tolist() == pytest.approx([1.5 - 2 * 0.25, 4.5 - 2 * 2.25, 3.0 - 2 * 1.0])
    assert torch.equal(score(reward, *TEXTS), found[""])
    assert score_groups(load_reward([length]), *TEXTS).keys() == {""}  # one member has nobody to disagree with
    skipping = score_groups(load_reward([length, some], none="skip", ensemble="worst"), *TEXTS)
    assert skipping[""].tolist() == [1.0, -1.0, -1.0]
    assert skipping["disagreement"].tolist() == pytest.approx([0.0, 2.0, 1.5])


@pytest.mark.parametrize(
    ("spec", "how", "message"),
    [
        (
            [length, twice],
            "wurst",
            "reward_ensemble='wurst' is not mean, worst or {uwo: <lambda>}. Did you mean 'worst'",
        ),
        ([length, twice], "uwo", "reward_ensemble='uwo' is not mean"),
        ([length, twice], {"uow": 1}, "is not mean, worst or"),
        ([length, twice], {"uwo": 1, "worst": 2}, "is not mean, worst or"),
        ([length, twice], {"uwo": -1}, r"reward_ensemble.uwo=-1 is not a finite number in \[0, inf\)"),
        ([length, twice], {"uwo": "x"}, "reward_ensemble.uwo=x is not a finite number"),
        (length, "worst", "reward_ensemble=worst: reward_from=.* is no list of rewards"),
        ({"a": length, "b": twice}, "worst", "is no list of rewards"),
        ([length], "worst", "is a list of one reward"),
    ],
)
def test_what_cannot_be_is_told(spec: Any, how: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec, ensemble=how)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reward models with other heads: two normalized, one not; and the language model that they start from."""
    root = tmp_path_factory.mktemp("ensemble")
    lm = start(root)
    found = {"lm": lm}
    for number, (name, mean, std) in enumerate([("a", 0.5, 2.0), ("b", -1.0, 0.25), ("raw", 0.0, 1.0)]):
        model = load_scalar_model(lm)
        torch.manual_seed(number)
        torch.nn.init.normal_(model.score.weight)
        model.config.reward_mean, model.config.reward_std = mean, std
        model.save_pretrained(root / name)
        load_tokenizer(lm).save_pretrained(root / name)
        found[name] = str(root / name)
    return found


@pytest.mark.slow
def test_the_scores_of_folders_are_normalized_before_they_are_compared(folders: dict[str, str]) -> None:
    texts: tuple[Any, ...] = (["name red"] * 3, ["gold", "red gold", "lime"], [{}] * 3)
    parts = [score(load_reward(folders[name]), *texts) for name in "ab"]
    worst = load_reward([folders["a"], folders["b"]], ensemble="worst")
    assert torch.allclose(score(worst, *texts), torch.minimum(*parts))
    with pytest.raises(UserError, match="raw is not normalized: its config.json has no reward_mean and reward_std"):
        load_reward([folders["a"], folders["raw"]], ensemble="worst")
    load_reward([folders["a"], folders["raw"]])  # a mean was one before


@pytest.mark.slow
@quiet_lightning
def test_ppo_learns_from_the_mean_less_the_variance() -> None:
    """One rollout: the scores are those of two members, combined by hand; the disagreement is logged."""

    def even(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
        return [float(len(text) % 2) for text in responses]

    def long(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
        return [0.1 * len(text) for text in responses]

    seen: dict[str, Any] = {}
    for name, how in (("mean", "mean"), ("uwo", {"uwo": 2.0})):
        module = build(reward=load_reward([even, long], ensemble=how), num_generations=3)
        history = fit(module, Prompts(1))
        seen[name] = (module.samples_seen, history.rows[0])
    assert [row["response"] for row in seen["mean"][0]] == [row["response"] for row in seen["uwo"][0]]
    penalties = []
    for mean, uwo in zip(seen["mean"][0], seen["uwo"][0], strict=True):
        a, b = even([], [mean["response"]], [])[0], long([], [mean["response"]], [])[0]
        assert mean["reward"] == pytest.approx((a + b) / 2, abs=1e-6)
        assert uwo["reward_disagreement"] == pytest.approx(abs(a - b) / 2, abs=1e-6)
        penalties.append(2.0 * ((a - b) / 2) ** 2)
        assert uwo["reward"] == pytest.approx((a + b) / 2 - penalties[-1], abs=1e-5)
    assert max(penalties) > 0.01
    metrics = seen["uwo"][1]
    expected = sum(row["reward_disagreement"] for row in seen["uwo"][0]) / len(penalties)
    assert metrics["reward/proxy_disagreement"] == pytest.approx(expected, rel=1e-5)
    assert seen["mean"][1]["reward/proxy"] - metrics["reward/proxy"] == pytest.approx(
        sum(penalties) / len(penalties), rel=1e-3
    )
    assert seen["mean"][1]["reward/total"] != pytest.approx(metrics["reward/total"])  # what is learned from


@pytest.mark.slow
def test_best_of_n_chooses_by_the_worst_member(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"name {w}"}) + "\n" for w in ("red", "lime", "gold"))
    )
    cfg = composed(
        "stage=evaluate", f"data.train={tmp_path / 'prompts.jsonl'}", f"paths.run={tmp_path}", f"init_from={folders['lm']}",
        f"reward_from=[{folders['a']},{folders['b']}]", "reward_ensemble=worst", f"paths.cache={tmp_path / 'cache'}",
        "evaluate.num_generations=4", "evaluate.best_of=4", "evaluate.max_new_tokens=5", "logger=none",
    )  # fmt: skip
    stage.run(Run(STAGES["evaluate"], cfg, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "samples" / "model.jsonl").read_text().splitlines()]
    best = [json.loads(line) for line in (tmp_path / "samples" / "model_bo4.jsonl").read_text().splitlines()]
    members = [load_reward(folders[name]) for name in "ab"]
    for number, row in enumerate(best):
        mine = rows[4 * number : 4 * number + 4]
        texts: tuple[Any, ...] = ([r["prompt"] for r in mine], [r["response"] for r in mine], [{}] * 4)
        worst = torch.minimum(*(score(member, *texts) for member in members))
        assert row["response"] == mine[int(worst.argmax())]["response"]
        assert [r["reward"] for r in mine] == pytest.approx(worst.tolist(), abs=1e-5)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model/reward_disagreement"] == pytest.approx(
        sum(r["reward_disagreement"] for r in rows) / 12, abs=1e-6
    )
    assert "model/reward_worst" not in metrics  # there are no groups


def test_an_ensemble_without_rewards_is_refused(tmp_path: Path) -> None:
    cfg = composed("stage=sft", "reward_ensemble=worst")
    with pytest.raises(UserError, match="reward_ensemble=worst needs reward_from="):
        Run(STAGES["sft"], cfg, tmp_path)


def test_candidates_have_the_disagreement_of_each_response() -> None:
    from rlhf_lightning.stages.candidates import measured

    row = {"scores": [1.0, 2.0], "disagreement": [0.5, 0.0], "tokens": [1, 2], "finished": [True, False]}
    assert measured(row)["disagreement"] == [0.5, 0.0]
