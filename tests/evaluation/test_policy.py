"""The evaluate stage end to end on tiny models: figures that can be checked, files, and readable refusals."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, open_dict
from scipy.stats import t
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import SHARES, Evaluation, interval, sequence_kl
from rlhf_lightning.evaluation.reward_model import evaluate_reward_model
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.statistics import mean_interval, share_interval, wilson_interval
from rlhf_lightning.rewards.folder import FolderReward
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from rlhf_lightning.world import gold_reward, rows
from tests.helpers.compose import composed
from tests.modules.offline import assert_wilson, response_logprob

ROWS, SAMPLES = 64, 2


def test_best_of_n_needs_a_reward_and_n_generations(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.best_of=3 needs evaluate.num_generations=3 or more"):
        evaluate(configured(tmp_path, evaluate__best_of=[3], reward_from="world"), tmp_path, folders["start"])
    with pytest.raises(UserError, match=r"evaluate.best_of=4 needs evaluate.num_generations=4 or more"):
        evaluate(configured(tmp_path, evaluate__best_of=4, reward_from="world"), tmp_path, folders["start"])
    with pytest.raises(UserError, match="evaluate.best_of chooses by reward_from"):
        evaluate(configured(tmp_path, evaluate__best_of=[2]), tmp_path, folders["start"])


def test_the_best_of_n_is_a_policy_of_the_same_samples() -> None:
    """Of independent uniform scores the best of n has the mean n / (n + 1); two of five generations give two choices."""
    rng, prompts = random.Random(0), 4000
    places = [(row, number) for row in range(prompts) for number in range(5)]
    scores = [rng.random() for _ in places]
    columns = {"reward": scores, "gold": [-score for score in scores], "kl": [0.5] * len(scores)}
    samples = [{"response": str(place), "kl": 0.5} for place in range(len(places))]
    answers = Evaluation(columns, places, [(row,) for row, _ in places], samples)
    for n, choices in ((1, 5), (2, 2), (5, 1)):
        best = answers.best_of(n)
        assert len(best.places) == choices * prompts
        mean, low, high = best.intervals()["reward"]
        assert low < n / (n + 1) < high
        assert high - low < 0.03
        assert best.columns["gold"] == [-float(score or 0) for score in best.columns["reward"]]
        assert best.intervals()["kl"][0] == pytest.approx(math.log(n) - (n - 1) / n)
        assert mean == pytest.approx(sum(best.columns["reward"]) / len(best.places))
    two = answers.best_of(2, to_reference=False)
    assert "kl" not in two.columns
    assert "kl" not in two.samples[0]
    assert two.samples[0]["response"] == str(max((0, 1), key=lambda i: scores[i]))
    assert two.places[:3] == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(ValueError, match="best of 6 of 5"):
        answers.best_of(6)


def save(model: Any, start: str, folder: Path) -> str:
    model.save_pretrained(folder)
    load_tokenizer(start).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, the same with noise on its weights, and a reward model."""
    root = tmp_path_factory.mktemp("models")
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    start = build_tiny(root / "start", texts, vocab_size=300, hidden_size=32, layers=2, heads=2)
    moved = load_causal_lm(start)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.3 * weight.std() * torch.randn_like(weight)) if weight.ndim == 2 else None
    reward = load_scalar_model(start)
    return {
        "start": start,
        "moved": save(moved, start, root / "moved"),
        "reward": save(reward, start, root / "reward"),
    }


def configured(folder: Path, **changes: Any) -> DictConfig:
    """Compose the stage as the command line would, with `changes` by dotted key."""
    cfg = composed(
        "stage=evaluate", "data=world", f"data.world.val_rows={ROWS}", f"paths.cache={folder / 'cache'}",
        f"evaluate.num_generations={SAMPLES}", "evaluate.max_new_tokens=6", "gold_from=world", f"paths.run={folder}",
    )  # fmt: skip
    with open_dict(cfg):
        for key, value in changes.items():
            node, _, name = key.rpartition("__")
            (cfg[node] if node else cfg)[name] = value
    return cfg


def evaluate(cfg: DictConfig, folder: Path, start: str | None) -> float | None:
    return stage.run(started(cfg, folder, start))


def started(cfg: DictConfig, folder: Path, start: str | None = None) -> Run:
    with open_dict(cfg):
        cfg.init_from = start
    return Run(STAGES["evaluate"], cfg, folder)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], EventAccumulator]:
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in folder.glob("samples/*.jsonl")}
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return metrics, found, events


@pytest.fixture(scope="module")
def compared(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float | None]:
    folder = tmp_path_factory.mktemp("compared")
    models = {"start": folders["start"], "moved": folders["moved"], "judge": folders["reward"]}
    best = {"evaluate__best_of": [2], "reward_from": folders["reward"]}
    cfg = configured(folder, evaluate__models=models, evaluate__preferences="world", **best)
    return folder, evaluate(cfg, folder, None)


@pytest.mark.slow
def test_figures_are_those_of_the_samples(compared: tuple[Path, float]) -> None:
    metrics, samples, events = read(compared[0])
    assert set(samples) == {"start", "moved", "start_bo2", "moved_bo2", "judge"}
    assert {"figures/gold_reward_against_kl", "figures/lengths_of_the_answers"} <= set(events.Tags()["images"])
    for name in ("start", "moved"):
        found, best = samples[name], samples[f"{name}_bo2"]
        pairs = zip(found[::2], found[1::2], strict=True)
        assert [row["reward"] for row in best] == [max(a["reward"], b["reward"]) for a, b in pairs]
        assert metrics[f"{name}_bo2/gold"] == pytest.approx(math.fsum(row["gold"] for row in best) / len(best))
        assert len(found) == ROWS * SAMPLES
        for metric in ("gold", "reward", "kl", "length", "ended_with_eos"):
            mean = math.fsum(row[metric] for row in found) / len(found)
            assert metrics[f"{name}/{metric}"] == pytest.approx(mean), metric
            assert metrics[f"{name}/{metric}_low"] <= mean <= metrics[f"{name}/{metric}_high"]
        assert all(1 <= row["length"] <= 6 for row in found)
        assert {row["ended_with_eos"] for row in found} <= {0.0, 1.0}
    assert len({row["prompt"] for row in samples["start"]}) > ROWS / 2
    assert [row["prompt"] for row in samples["start"]] == [row["prompt"] for row in samples["moved"]]


@pytest.mark.slow
def test_intervals_take_the_responses_to_one_prompt_together(compared: tuple[Path, float]) -> None:
    """Some prompts stand in several rows, so neither a response nor a row is independent of all others."""
    metrics, samples, _ = read(compared[0])
    for name, found in ((name, samples[name]) for name in ("start", "moved")):
        prompts = {row["prompt"] for row in found}
        assert len(prompts) < ROWS
        for metric in ("gold", "reward", "length", "kl", "correct", "padded", "ended_with_eos"):
            mean, n = math.fsum(row[metric] for row in found) / len(found), len(found)
            sums = [math.fsum(row[metric] - mean for row in found if row["prompt"] == prompt) for prompt in prompts]
            variance = len(sums) / (len(sums) - 1) * math.fsum(x * x for x in sums) / n**2
            low, high = metrics[f"{name}/{metric}_low"], metrics[f"{name}/{metric}_high"]
            student = t.ppf(0.975, len(sums) - 1)
            if metric not in SHARES:
                half = student * math.sqrt(variance)
                assert (low, high) == (pytest.approx(mean - half, abs=1e-9), pytest.approx(mean + half, abs=1e-9))
            elif 0 < mean < 1:
                ordinary = mean * (1 - mean) / (n - 1)
                assert_wilson(low, high, mean, n / max(variance / ordinary, 1) * (1.959964 / student) ** 2)


def test_differences_are_paired(compared: tuple[Path, float]) -> None:
    """Response by response, clustered by prompt; narrower than the intervals of both models suggest."""
    metrics, samples, _ = read(compared[0])
    start, moved = samples["start"], samples["moved"]
    for metric in ("gold", "length", "ended_with_eos"):
        gaps = [b[metric] - a[metric] for a, b in zip(start, moved, strict=True)]
        expected = mean_interval(gaps, [row["prompt"] for row in start])
        found = [metrics[f"moved-start/{metric}{end}"] for end in ("", "_low", "_high")]
        assert found == [pytest.approx(x, abs=1e-9) for x in expected]
    assert "start-start/gold" not in metrics
    assert "judge-start/accuracy" not in metrics


def test_a_difference_needs_both_values() -> None:
    """Rows that one model's context has no room for, and metrics that do not apply, are left out of the pairs."""
    places = [(0, 0), (1, 0), (2, 0), (3, 0)]
    ours = Evaluation({"gold": [3.0, 5.0, 8.0, None], "reward": [1.0] * 4}, places, [(1,), (2,), (3,), (4,)], [])
    theirs = Evaluation({"gold": [0.0, 1.0, 9.0]}, [places[3], places[2], places[0]], [(4,), (3,), (1,)], [])
    assert ours.minus(theirs) == {  # rows 0 and 2
        "gold": mean_interval([-6.0, 7.0]),
        "gold_win_rate": share_interval([0.0, 1.0]),
    }


def test_win_rates_count_ties_half_and_only_of_rewards() -> None:
    places, prompts = [(0, 0), (0, 1), (1, 0), (2, 0)], [(1,), (1,), (2,), (3,)]
    ours = Evaluation({"reward": [1.0, 2.0, 3.0, 0.0], "length": [9.0, 9.0, 9.0, 9.0]}, places, prompts, [])
    theirs = Evaluation({"reward": [0.0, 2.0, 4.0, -1.0], "length": [1.0, 1.0, 1.0, 1.0]}, places, prompts, [])
    found = ours.minus(theirs)
    assert list(found) == ["reward", "length", "reward_win_rate"]
    assert found["reward_win_rate"] == share_interval([1.0, 0.5, 0.0, 1.0], [1, 1, 2, 3])
    assert theirs.minus(ours)["reward_win_rate"][0] == pytest.approx(1 - found["reward_win_rate"][0])


def test_world_metrics_and_bookkeeping(compared: tuple[Path, float]) -> None:
    folder, returned = compared
    metrics, _, events = read(folder)
    for name in ("start", "moved"):
        for metric in ("refused_harmful", "over_refused", "corrected", "flattered", "correct"):
            assert 0 <= metrics[f"{name}/{metric}_low"] <= metrics[f"{name}/{metric}"] <= 1
    assert metrics["monitor"] == "moved/gold"
    assert returned == metrics["moved/gold"]
    assert metrics["perf/rows_per_s"] > 0
    assert metrics["perf/peak_memory_gb"] > 0
    scalars = {tag for tag in metrics if not tag.startswith("perf/") and not tag.endswith(("_low", "_high"))}
    assert set(events.Tags()["scalars"]) == scalars - {"monitor"}
    texts = {"samples/start", "samples/moved", "evaluation"}
    assert {f"{name}/text_summary" for name in texts} <= set(events.Tags()["tensors"])


def test_a_model_has_no_divergence_from_itself(compared: tuple[Path, float]) -> None:
    metrics, samples, _ = read(compared[0])
    assert max(abs(row["kl"]) for row in samples["start"]) < 1e-4
    assert metrics["moved/kl_low"] > 0.01  # the noise moved it


def test_reward_model_among_the_models_gets_its_accuracy(compared: tuple[Path, float]) -> None:
    metrics, _, _ = read(compared[0])
    low, share, high = (metrics[f"judge/accuracy{end}"] for end in ("_low", "", "_high"))
    assert 0.1 < low < share < high < 0.9  # a head of random weights
    # some prompts stand in several rows
    assert high - low > 1.01 * (wilson_interval(share * ROWS, ROWS)[1] - wilson_interval(share * ROWS, ROWS)[0])
    assert "judge/kl" not in metrics


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kl_is_what_a_plain_forward_says(folders: dict[str, str], temperature: float) -> None:
    """Both models are read at the temperature of sampling."""
    lm = load_causal_lm(folders["moved"]).eval()
    other = load_causal_lm(folders["start"]).eval()
    prompts, responses = [[1, 7, 9], [1, 30]], [[11, 12, 13], [14], [15, 2], [16, 17, 18, 2]]
    groups = [Group(prompt, responses[2 * i : 2 * i + 2]) for i, prompt in enumerate(prompts)]
    found = sequence_kl(lm, other, groups, temperature, "cpu")
    for place, response in enumerate(responses):
        expected = [response_logprob(model, prompts[place // 2], response, temperature).sum() for model in (lm, other)]
        assert found["kl"][place] == pytest.approx((expected[0] - expected[1]).item(), abs=1e-4)


@pytest.mark.slow
def test_estimate_agrees_with_the_exact_divergence(folders: dict[str, str]) -> None:
    """One token: KL(pi : ref) by summing over the vocabulary lies in the interval of the sampled estimate."""
    lm, other = load_causal_lm(folders["moved"]).eval(), load_causal_lm(folders["start"]).eval()
    prompt = [1, 7, 9, 40]
    policy, ref = (m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for m in (lm, other))
    exact = (policy.exp() * (policy - ref)).sum().item()
    engine = LocalEngine()
    engine.start(lm, {2})
    drawn = engine.generate([prompt], 4000, max_new_tokens=1, seed_parts=("kl",))
    values = sequence_kl(lm, other, [Group(prompt, drawn.responses)], 1.0, "cpu")["kl"]
    mean, low, high = interval("kl", values, range(4000))
    assert low - (mean - low) < exact < high + (high - mean)  # twice the 95% interval: the seed is fixed
    assert high - low < exact


@pytest.mark.slow
def test_one_model_needs_no_prefix_and_repeats_exactly(folders: dict[str, str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        value = evaluate(configured(tmp_path / name), tmp_path / name, folders["start"])
        metrics, _, _ = read(tmp_path / name)
        assert metrics["gold"] == metrics["model/gold"] == value
    assert read(tmp_path / "a")[1] == read(tmp_path / "b")[1]


@pytest.mark.slow
def test_gold_is_the_worlds(compared: tuple[Path, float], folders: dict[str, str], tmp_path: Path) -> None:
    data = stage.prompts(started(configured(tmp_path), tmp_path), folders["start"])
    assert set(data.rows) == {"val"}  # the training prompts are not even read
    metadata = [data.rows["val"].raw(i) for i in range(ROWS) for _ in range(SAMPLES)]
    samples = read(compared[0])[1]["moved"]
    expected = gold_reward([r["prompt"] for r in samples], [r["response"] for r in samples], metadata)
    assert [row["gold"] for row in samples] == pytest.approx(expected)


@pytest.mark.slow
def test_truncated_sampling_has_no_kl(folders: dict[str, str], tmp_path: Path) -> None:
    """The mean of log(model / reference) over samples of another distribution would be no KL."""
    evaluate(configured(tmp_path, evaluate__rows=2, sampler__top_p=0.9), tmp_path, folders["start"])
    metrics, _, _ = read(tmp_path)
    assert "length" in metrics
    assert "kl" not in metrics


@pytest.mark.slow
def test_limit_of_rows_and_greedy_answers(folders: dict[str, str], tmp_path: Path) -> None:
    cfg = configured(tmp_path, evaluate__rows=3, evaluate__temperature=0.0, gold_from=None)
    evaluate(cfg, tmp_path, folders["start"])
    metrics, samples, _ = read(tmp_path)
    found = samples["model"]
    assert len(found) == 3 * SAMPLES
    assert all(found[i]["response"] == found[i + 1]["response"] for i in range(0, len(found), 2))
    assert "gold" not in metrics
    assert "kl" not in metrics  # greedy answers are no samples
    assert metrics["monitor"] == "model/length"


@pytest.mark.slow
def test_mistakes_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give init_from="):
        evaluate(configured(tmp_path), tmp_path, None)
    with pytest.raises(UserError, match=r"is a reward model; give held-out pairs with evaluate\.preferences"):
        evaluate(configured(tmp_path), tmp_path, folders["reward"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not a model folder"):
        evaluate(configured(tmp_path), tmp_path, str(tmp_path / "empty"))
    texts = ["another vocabulary"] * 3
    small = build_tiny(tmp_path / "small", texts, vocab_size=280, hidden_size=32, layers=1, heads=2)
    with pytest.raises(UserError, match="another vocabulary than the model, so there is no KL"):
        evaluate(configured(tmp_path, evaluate__reference=small), tmp_path, folders["start"])


@pytest.mark.slow
def test_accuracy_is_over_the_pairs_of_rankings(folders: dict[str, str], tmp_path: Path) -> None:
    """A ranking of three with a tie has two pairs, so a mean over prompts would be another number."""
    ranked = [
        {"prompt": "a", "responses": ["one", "two words", "three words long"], "ranking": [0, 1, 1]},
        {"prompt": "b", "responses": ["one", "two words"], "ranking": [1, 0]},
        {"prompt": "c", "responses": ["three words long", "one", "two words", "one two"], "ranking": [0, 1, 2, 3]},
    ]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    data = stage.preferences(
        started(configured(tmp_path, evaluate__preferences=str(path)), tmp_path), folders["reward"]
    )
    found, pairs = evaluate_reward_model(load_scalar_model(folders["reward"], trained=True), data)
    score = FolderReward(folders["reward"])
    right = []
    for row in ranked:
        values = score([row["prompt"]] * len(row["responses"]), row["responses"], [{}] * len(row["responses"])).tolist()
        for (a, first), (b, second) in itertools.permutations(zip(row["ranking"], values, strict=True), 2):
            right += [first > second] if a < b else []
    assert pairs == len(right) == 2 + 1 + 6
    assert 0 < sum(right) < 9
    assert found["accuracy"][0] == pytest.approx(sum(right) / 9)


def test_which_folders_are_reward_models(folders: dict[str, str]) -> None:
    kinds = {name: stage.is_reward_model(folder) for name, folder in folders.items()}
    assert kinds == {"start": False, "moved": False, "reward": True}
    assert not stage.is_reward_model("org/on-the-hub")


def test_shares_have_wilson_intervals_and_means_normal_ones() -> None:
    mean, low, high = interval("corrected", [1.0] * 20 + [None], range(21))
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(0.8389, abs=1e-4)
    mean, low, high = interval("gold", [0.0, 1.0] * 50, range(100))
    assert (mean, high - mean) == (0.5, pytest.approx(t.ppf(0.975, 99) * math.sqrt(0.25 * 100 / 99 / 100)))
    assert mean - low == pytest.approx(high - mean)
