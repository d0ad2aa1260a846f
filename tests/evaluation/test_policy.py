"""The evaluate stage end to end on tiny models: figures that can be checked, files, and readable refusals."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, open_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import policy as stage
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime import config
from rlhf_lightning.stages.train import evaluated
from rlhf_lightning.world import gold_reward, rows
from tests.helpers.compose import composed

ROWS, SAMPLES = 64, 2


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
        f"evaluate.samples={SAMPLES}", "evaluate.max_new_tokens=6", "gold_from=world", f"paths.run={folder}",
    )  # fmt: skip
    with open_dict(cfg):
        for key, value in changes.items():
            node, _, name = key.rpartition("__")
            (cfg[node] if node else cfg)[name] = value
    return cfg


def evaluate(cfg: DictConfig, folder: Path, start: str | None) -> float | None:
    return stage.run_evaluate(*evaluated(cfg, folder, start), partial(config.instantiate, cfg.data, "data"))


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
    cfg = configured(folder, evaluate__models=models, evaluate__preferences="world", reward_from=folders["reward"])
    return folder, evaluate(cfg, folder, None)


def test_figures_are_those_of_the_samples(compared: tuple[Path, float]) -> None:
    metrics, samples, _ = read(compared[0])
    assert set(samples) == {"start", "moved"}
    for name, found in samples.items():
        assert len(found) == ROWS * SAMPLES
        for metric in ("gold", "reward", "kl", "length", "ended_with_eos"):
            mean = math.fsum(row[metric] for row in found) / len(found)
            assert metrics[f"{name}/{metric}"] == pytest.approx(mean), metric
            assert metrics[f"{name}/{metric}_low"] <= mean <= metrics[f"{name}/{metric}_high"]
        assert all(1 <= row["length"] <= 6 for row in found)
        assert {row["ended_with_eos"] for row in found} <= {0.0, 1.0}
    assert len({row["prompt"] for row in samples["start"]}) > ROWS / 2
    assert [row["prompt"] for row in samples["start"]] == [row["prompt"] for row in samples["moved"]]


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
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / ROWS), rel=0.2)
    assert "judge/kl" not in metrics


def test_kl_is_what_a_plain_forward_says(folders: dict[str, str], tmp_path: Path) -> None:
    cfg = configured(tmp_path)
    lm = load_causal_lm(folders["moved"]).eval()
    other = load_causal_lm(folders["start"]).eval()
    prompts, responses = [[1, 7, 9], [1, 30]], [[11, 12, 13], [14], [15, 2], [16, 17, 18, 2]]
    found = stage.sequence_kl(config.plain(cfg), lm, folders["start"], prompts, responses, 2)
    for place, response in enumerate(responses):
        prompt = prompts[place // 2]
        ids, expected = torch.tensor([prompt + response]), 0.0
        for model, sign in ((lm, 1), (other, -1)):
            logprobs = model(ids).logits[0].log_softmax(-1)
            expected += sign * sum(logprobs[len(prompt) - 1 + i, t].item() for i, t in enumerate(response))
        assert found[place] == pytest.approx(expected, abs=1e-4)


def test_estimate_agrees_with_the_exact_divergence(folders: dict[str, str], tmp_path: Path) -> None:
    """One token: KL(pi : ref) by summing over the vocabulary lies in the interval of the sampled estimate."""
    from rlhf_lightning.generation.local import Sampler

    lm, other = load_causal_lm(folders["moved"]).eval(), load_causal_lm(folders["start"]).eval()
    prompt = [1, 7, 9, 40]
    policy, ref = (m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for m in (lm, other))
    exact = (policy.exp() * (policy - ref)).sum().item()
    drawn = Sampler(lm, {2}, 1)([prompt], 4000, ("kl",))
    values = stage.sequence_kl(
        config.plain(configured(tmp_path)), lm, folders["start"], [prompt], drawn.responses, 4000
    )
    mean, low, high = stage.interval("kl", values, range(4000))
    assert low - (mean - low) < exact < high + (high - mean)  # twice the 95% interval: the seed is fixed
    assert high - low < exact


def test_one_model_needs_no_prefix_and_repeats_exactly(folders: dict[str, str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        value = evaluate(configured(tmp_path / name), tmp_path / name, folders["start"])
        metrics, _, _ = read(tmp_path / name)
        assert metrics["gold"] == metrics["model/gold"] == value
    assert read(tmp_path / "a")[1] == read(tmp_path / "b")[1]


def test_gold_is_the_worlds(compared: tuple[Path, float], folders: dict[str, str], tmp_path: Path) -> None:
    cfg = configured(tmp_path)
    data = config.instantiate(cfg.data, "data", tokenizer=load_tokenizer(folders["start"]))
    stage.prepare(data)
    assert set(data.rows) == {"val"}  # the training prompts are not even read
    metadata = [data.rows["val"].raw(i) for i in range(ROWS) for _ in range(SAMPLES)]
    samples = read(compared[0])[1]["moved"]
    expected = gold_reward([r["prompt"] for r in samples], [r["response"] for r in samples], metadata)
    assert [row["gold"] for row in samples] == pytest.approx(expected)


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
    with pytest.raises(UserError, match="another vocabulary, so there is no KL"):
        evaluate(configured(tmp_path, evaluate__reference=small), tmp_path, folders["start"])


def test_which_folders_are_reward_models(folders: dict[str, str]) -> None:
    kinds = {name: stage.is_reward_model(folder) for name, folder in folders.items()}
    assert kinds == {"start": False, "moved": False, "reward": True}
    assert not stage.is_reward_model("org/on-the-hub")


def test_shares_have_wilson_intervals_and_means_normal_ones() -> None:
    mean, low, high = stage.interval("corrected", [1.0] * 20 + [None], range(21))
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(0.8389, abs=1e-4)
    mean, low, high = stage.interval("gold", [0.0, 1.0] * 50, range(100))
    assert (mean, high - mean) == (0.5, pytest.approx(1.959964 * math.sqrt(0.25 * 100 / 99 / 100)))
    assert mean - low == pytest.approx(high - mean)
