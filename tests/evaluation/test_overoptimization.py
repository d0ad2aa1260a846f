"""Curves of reward against KL: fits with known coefficients, planted overoptimization, and the stage end to end."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import open_dict
from scipy.special import xlogy

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.exact_kl import can_enumerate, exact_kl
from rlhf_lightning.evaluation.overoptimization import (
    Curve,
    best_of_n_curve,
    fit,
    frontier,
    least_squares,
    peak,
    points,
    policy_curve,
)
from rlhf_lightning.evaluation.policy import Evaluation, sequence_kl
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.kl import best_of_n_kl
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import overoptimize as stage
from rlhf_lightning.world import rows
from tests.helpers.compose import composed
from tests.modules.test_reach_optimum import SPACE, distribution, load

FORMS = {"square": lambda d, a, b: d * (a - b * d), "log": lambda d, a, b: a * d - b * xlogy(d, d)}


@pytest.mark.parametrize("form", FORMS)
def test_known_coefficients_are_found(form: str) -> None:
    kl = np.array([9.0, 0.0, 0.3, 1.0, 4.0, 2.0])
    a, b, r2 = least_squares(kl, FORMS[form](np.sqrt(kl), 1.3, 0.4), form) or (0, 0, 0)
    assert (a, b, r2) == (pytest.approx(1.3), pytest.approx(0.4), pytest.approx(1.0))


def test_too_few_points_decide_nothing() -> None:
    assert least_squares([0.1, 0.5, 1.0], [0.1, 0.2, 0.3], "log") is None
    assert least_squares([0.0] * 5, [0.1] * 5, "log") is None


def test_many_policies_at_one_distance_weigh_as_one() -> None:
    """Ten copies of a point that is off the curve change the fit as little as one does."""
    kl, off = np.array([0.25, 1.0, 2.25, 4.0, 6.25]), 0.3
    gain = FORMS["square"](np.sqrt(kl), 1.0, 0.3)
    gain[2] += off
    once = least_squares(kl, gain, "square")
    often = least_squares(np.append(kl, [kl[2]] * 9), np.append(gain, [gain[2]] * 9), "square")
    assert once is not None
    assert often == pytest.approx(once, abs=1e-9)


def simulated(method: str, prompts: int, seed: int) -> Curve:
    """A curve whose prompts have rewards and KLs of their own around a known one."""
    rng = np.random.default_rng(seed)
    kl = np.linspace(0.1, 3, 8)[:, None] * np.ones((1, prompts))
    gain = FORMS["square" if method == "best_of_n" else "log"](np.sqrt(kl), 1.2, 0.5)
    start = rng.normal(0, 0.5, prompts)
    gold = start + gain * (1 + rng.normal(0, 0.6, prompts)) + rng.normal(0, 0.3, kl.shape)
    kl = kl if method == "best_of_n" else kl + rng.normal(0, 0.3, kl.shape)
    return Curve(method, "proxy", [str(i) for i in range(8)], kl, gold, gold, start, range(prompts))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["best_of_n", "ppo"])
@pytest.mark.parametrize("fits", [40, pytest.param(300, marks=pytest.mark.nightly)])
def test_intervals_cover_the_true_coefficients(method: str, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 90% of the 95% intervals do: a percentile bootstrap is a little short at 60 prompts."""
    monkeypatch.setattr("rlhf_lightning.evaluation.overoptimization.RESAMPLES", 200)
    covered = {"a": 0, "b": 0}
    for seed in range(fits):
        found = fit(simulated(method, 60, seed), seed)
        assert found is not None
        covered["a"] += found.a[1] < 1.2 < found.a[2]
        covered["b"] += found.b[1] < 0.5 < found.b[2]
    assert all(count / fits >= 0.9 for count in covered.values()), covered
    assert fits < 100 or all(count / fits <= 0.99 for count in covered.values()), covered


def test_few_prompts_have_no_interval_and_the_seed_decides() -> None:
    few = fit(simulated("ppo", 12, 0))
    assert few is not None
    assert math.isfinite(few.a[0])
    assert math.isnan(few.a[1])
    curve = simulated("ppo", 40, 0)
    assert fit(curve, 1) == fit(curve, 1) != fit(curve, 2)


def test_rows_of_one_prompt_are_resampled_together() -> None:
    """Every row three times is no further knowledge: the interval stays."""
    curve = simulated("best_of_n", 40, 3)
    arrays = {name: np.repeat(getattr(curve, name), 3, axis=-1) for name in ("kl", "reward", "gold", "start")}
    tripled = Curve(curve.method, curve.proxy, curve.settings, prompts=np.repeat(range(40), 3).tolist(), **arrays)
    one, three = fit(curve, 0), fit(tripled, 0)
    assert one is not None
    assert three is not None
    assert three.a == pytest.approx(one.a)
    assert three.b == pytest.approx(one.b)


# ---- planted overoptimization --------------------------------------------------------------------------------------


def answered(bonus: float, prompts: int = 200, size: int = 32, seed: int = 0) -> Evaluation:
    """Responses with a quality and an exponential length; gold subtracts half the length, the proxy adds a bonus."""
    rng = random.Random(seed)
    places = [(row, number) for row in range(prompts) for number in range(size)]
    quality, length = [rng.gauss(0, 1) for _ in places], [rng.expovariate(1) for _ in places]
    gold = [q - 0.5 * words for q, words in zip(quality, length, strict=True)]
    proxy = [g + bonus * words for g, words in zip(gold, length, strict=True)]
    samples = [{"prompt": "", "response": ""} for _ in places]
    return Evaluation({"reward": proxy, "gold": gold}, places, [(row,) for row, _ in places], samples)


def test_a_length_bonus_gives_a_peak_and_gold_itself_none() -> None:
    """A proxy that pays for length first chooses quality, too, then only length."""
    planted, clean = (best_of_n_curve(answered(bonus), "proxy") for bonus in (2.0, 0.0))
    stop = peak(planted)
    assert stop.lost[1] > 0
    assert 1 < int(stop.setting.removeprefix("n=")) < 16
    assert stop.kl == pytest.approx(best_of_n_kl(int(stop.setting.removeprefix("n="))))
    assert (np.diff(planted.reward.mean(1)) > 0).all()  # the proxy itself only rises
    assert peak(clean).setting == "n=32"
    assert peak(clean).lost[0] == 0
    found, spared = fit(planted), fit(clean)
    assert found is not None
    assert spared is not None
    # the planted fall is in the fit: its top, a / 2b, is inside the curve; the clean one's is not
    furthest = math.sqrt(best_of_n_kl(32))
    assert found.a[0] / (2 * found.b[0]) < furthest
    assert spared.a[0] / (2 * spared.b[0]) > furthest or spared.b[0] < 0


@pytest.mark.slow
@pytest.mark.nightly  # one of each per commit: test_a_length_bonus_gives_a_peak_and_gold_itself_none
def test_no_fall_is_found_where_there_is_none() -> None:
    """Of 100 clean curves none is accused, of 100 planted ones nearly every one."""
    accused = [
        sum(peak(best_of_n_curve(answered(bonus, 60, 16, seed), "proxy")).lost[1] > 0 for seed in range(100))
        for bonus in (0.0, 2.5)
    ]
    assert accused[0] == 0
    assert accused[1] >= 95


def test_rows_of_the_tables() -> None:
    curve = best_of_n_curve(answered(2.0, 40, 8), "long")
    start = curve.start
    assert start is not None
    answers = answered(0.0, 40, 1, seed=1)
    kl = {"kl": [0.7] * 40, "kl_k3": [0.8] * 40}
    policies = policy_curve(
        "ppo", "long", {"ppo": Evaluation({**answers.columns, **kl}, answers.places, answers.prompts, [])}, start
    )
    table = [*points(curve, 3), *points(policies, 3)]
    assert [row["setting"] for row in table] == [*(f"n={n}" for n in range(1, 9)), "ppo"]
    for row in table:
        assert row["low"] <= row["gold_reward"] <= row["high"]
        assert (row["proxy"], row["seed"], row["count"]) == ("long", 3, 40)
    assert (table[-1]["kl"], table[-1]["kl_k3"]) == (pytest.approx(0.7), pytest.approx(0.8))
    assert table[1]["kl_low"] == table[1]["kl_high"] == best_of_n_kl(2)
    assert table[1]["kl_ties"] < best_of_n_kl(2)
    best = frontier(table)
    assert {row["setting"] for row in best if row["best"]} >= {"n=1"}
    without = frontier([row | {"gold_reward": None} for row in table])
    assert [row["reward"] for row in without] == [row["proxy_reward"] for row in table]
    # rewards that only rise with KL are all on the frontier
    assert all(row["best"] for row in without if row["method"] == "best_of_n")


# ---- exact KL ------------------------------------------------------------------------------------------------------


def test_exact_kl_is_that_over_all_responses() -> None:
    """Against the sum over the 64 responses of three tokens out of four."""
    lm, reference = load(torch.float64), load(torch.float64)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(
                0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            )
    ours, theirs = distribution(lm), distribution(reference)
    expected = (ours.exp() * (ours - theirs)).sum().item()
    assert expected > 0.05
    assert exact_kl(lm, reference, [[0]], (), 3) == [pytest.approx(expected, abs=1e-10)]
    # token 3 ends a response: what comes after it is the same response
    ends: dict[tuple[int, ...], list[int]] = {}
    for place, response in enumerate(SPACE):
        cut = tuple(itertools.takewhile(lambda token: token != 3, response))
        ends.setdefault(cut, []).append(place)
    merged = [(ours[places].logsumexp(0), theirs[places].logsumexp(0)) for places in ends.values()]
    expected = sum((p.exp() * (p - q)).item() for p, q in merged)
    assert exact_kl(lm, reference, [[0]], {3}, 3) == [pytest.approx(expected, abs=1e-10)]
    assert exact_kl(lm, lm, [[0], [1, 2]], {3}, 3, temperature=0.5) == [0.0, 0.0]
    assert can_enumerate(lm, 6)
    assert not can_enumerate(lm, 7)


@pytest.mark.slow
def test_both_estimators_agree_with_the_exact_kl(folders: dict[str, str]) -> None:
    lm, reference = load_causal_lm(folders["moved"]).eval(), load_causal_lm(folders["start"]).eval()
    prompt, temperature = [1, 7, 9], 0.8
    (exact,) = exact_kl(lm, reference, [prompt], {2}, 2, temperature)
    engine = LocalEngine()
    engine.start(lm, {2})
    drawn = engine.generate([prompt], 1500, max_new_tokens=2, temperature=temperature, seed_parts=("kl",))
    found = sequence_kl(lm, reference, [Group(prompt, drawn.responses)], temperature, "cpu")
    for values in found.values():
        error = np.std(values) / math.sqrt(1500)
        assert abs(np.mean(values) - exact) < 3 * error
    assert min(found["kl_k3"]) >= 0 > min(found["kl"])
    assert np.std(found["kl_k3"]) < np.std(found["kl"])


# ---- the stage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, a run of "ppo" with models on the way, and a reward model."""
    root = tmp_path_factory.mktemp("models")
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    start = build_tiny(root / "start", texts, vocab_size=300, hidden_size=32, layers=1, heads=2)
    tokenizer = load_tokenizer(start)
    for step in (2, 4, 6, 8):
        moved = load_causal_lm(start)
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in moved.parameters():
                weight.add_(0.04 * step * weight.std() * torch.randn_like(weight)) if weight.ndim == 2 else None
        manifest = {"stage": "ppo", "metrics": {"global_step": step}}
        folder = root / "run" / ("model" if step == 8 else f"models/step_{step:06d}")
        write_model(folder, moved, tokenizer, manifest)
    write_model(root / "reward", load_scalar_model(start), tokenizer, {})
    return {"start": start, "moved": str(root / "run" / "model"), "reward": str(root / "reward")}


def started(folder: Path, init_from: str | None, *overrides: str, **options: Any) -> Run:
    cfg = composed(
        "stage=overoptimize", "data=world", "data.world.val_rows=24", f"paths.cache={folder / 'cache'}",
        "overoptimize.max_new_tokens=6", "overoptimize.best_of=4", f"paths.run={folder}", *overrides,
    )  # fmt: skip
    with open_dict(cfg):
        cfg.init_from = init_from
        cfg.overoptimize.update(options)
    return Run(STAGES["overoptimize"], cfg, folder)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tables" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_curves_of_a_run_and_of_best_of_n(folders: dict[str, str], tmp_path: Path) -> None:
    policies = {"first": {"ppo": folders["moved"]}}
    proxies = {"first": folders["reward"], "second": folders["reward"]}
    run = started(tmp_path, folders["start"], "gold_from=world", proxies=proxies, policies=policies)
    assert {role for role, _ in run.parents} == {"init", "first", "second", "first.ppo"}
    value = stage.run(run)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert value == metrics[metrics["monitor"]]
    found = table(tmp_path, "overoptimization")
    steps = [row for row in found if row["method"] == "ppo"]
    assert {row["setting"] for row in steps} == {f"ppo, step {step}" for step in (2, 4, 6, 8)}
    assert [row["kl"] for row in steps] == sorted(row["kl"] for row in steps)
    assert len([row for row in found if row["method"] == "best_of_n"]) == 8
    first, second = ([r["proxy_reward"] for r in found if r["setting"] == "n=4" and r["proxy"] == p] for p in proxies)
    assert first == second
    for row in table(tmp_path, "fits"):
        assert metrics[f"{row['method']}_{row['proxy']}/a"] == row["a"]
        assert row["a_low"] < row["a"] < row["a_high"]
        assert row["form"] == ("log" if row["method"] == "ppo" else "square")
    assert {(row["method"], row["proxy"]) for row in table(tmp_path, "fits")} == {
        ("best_of_n", "first"), ("best_of_n", "second"), ("ppo", "first"),
    }  # fmt: skip
    assert len(table(tmp_path, "frontier")) == len(found)
    samples = {path.stem for path in (tmp_path / "samples").iterdir()}
    assert samples == {"reference", *(f"first_ppo_step_{step}" for step in (2, 4, 6, 8))}
    written = (tmp_path / "samples" / "first_ppo_step_8.jsonl").read_text().splitlines()
    (last,) = (row for row in steps if row["setting"] == "ppo, step 8")
    assert math.fsum(json.loads(row)["gold"] for row in written) / 24 == pytest.approx(last["gold_reward"])
    assert not any(
        key.endswith(("_low", "_high")) and not math.isfinite(v) for key, v in metrics.items() if key != "monitor"
    )


@pytest.mark.slow
def test_one_proxy_without_gold_and_short_responses(folders: dict[str, str], tmp_path: Path) -> None:
    """Without gold there is the frontier of the proxy and no fit; one token can be enumerated."""
    run = started(
        tmp_path, folders["start"], f"reward_from={folders['reward']}", "overoptimize.max_new_tokens=1",
        policies={"reward": {"moved": folders["moved"]}},
    )  # fmt: skip
    stage.run(run)
    found = table(tmp_path, "overoptimization")
    assert all(row["gold_reward"] is None for row in found)
    assert table(tmp_path, "fits") == []
    (last,) = (row for row in found if row["setting"] == "moved, step 8")
    assert last["kl_low"] < last["kl_exact"] < last["kl_high"]
    assert {row["proxy"] for row in table(tmp_path, "frontier")} == {"reward"}


def test_a_response_that_a_judge_did_not_rate_is_no_point() -> None:
    answers = Evaluation({"gold": [0.5, None]}, [(0, 0), (0, 1)], [(1,), (1,)], [{}, {}])
    with pytest.raises(UserError, match="1 of 2 responses have no gold: a curve needs all of them"):
        best_of_n_curve(answers, "reward", "gold")


def test_mistakes_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    def refused(match: str, *overrides: str, init_from: str | None = folders["start"], **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            stage.run(started(tmp_path, init_from, *overrides, **options))

    reward = f"reward_from={folders['reward']}"
    refused("give either reward_from=<proxy reward> or overoptimize.proxies")
    refused("give either reward_from", reward, proxies={"a": folders["reward"]})
    refused("policies.rewrad: the proxies are reward. Did you mean 'reward'", reward, policies={"rewrad": {"a": "x"}})
    refused(r"overoptimize.policies.reward=\S+ is no map", reward, policies={"reward": folders["moved"]})
    refused("'a/b' cannot be a name", reward, policies={"reward": {"a/b": folders["moved"]}})
    refused("overoptimize.policies=x is no map", reward, policies="x")
    refused("overoptimize.best_of=0 is not a whole number", reward, best_of=0)
    refused(r"overoptimize.temperature=0.0 is not a finite number in \(0, inf\)", reward, temperature=0.0)
    refused("sampler.top_p=0.9: samples of a cut distribution have no KL", reward, "sampler.top_p=0.9")
    refused("needs a model to start from", reward, init_from=None)
