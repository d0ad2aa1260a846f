"""PPO on a real pretrained model with a reward that is a plain Python function: happier stories that are still stories."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.cli import rlhf

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
SENTIMENT = """
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def sentiment(prompts, responses, metadata):
    return [analyzer.polarity_scores(text)["compound"] for text in responses]
"""
STARTS = ["{} had a", "One day, {} saw a", "{} wanted to", "{} found a box. In the box"]
NAMES = ["Tom", "Lily", "Ben", "Mia", "Sam", "Sue", "Tim", "Anna"]


def test_stories_become_happier_and_stay_stories(stories_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sentiment.py").write_text(SENTIMENT)
    rows = [json.dumps({"text": start.format(name)}) for start in STARTS for name in NAMES]
    (tmp_path / "openings.jsonl").write_text("\n".join(rows))
    rlhf(
        tmp_path, "stage=ppo", f"model={stories_model}", "reward_from=sentiment:sentiment", "data=prompts/jsonl",
        "data.train=openings.jsonl", "data.template=plain", "data.batch_size=32", "ppo.max_new_tokens=32",
        "ppo.missing_eos_penalty=0", "ppo.kl_target=4", "ppo.kl_horizon=160", "optimizer.lr=3e-4", "max_epochs=-1",
        "max_steps=80", "callbacks.samples.count=32",
    )  # fmt: skip
    (run,) = (tmp_path / "outputs" / "ppo" / "default").iterdir()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    reward, kl = ([e.value for e in events.Scalars(tag)] for tag in ("reward/proxy", "kl/reference"))
    assert len(reward) == 20
    # one iteration's mean of 32 scores has a standard error of 0.08; the mean of five 0.035
    assert mean(reward[-5:]) > mean(reward[:3]) + 0.15
    assert 1 < max(kl) < 12  # three times the target, while the controller still learns
    last = [json.loads(line) for line in max((run / "samples").iterdir()).read_text().splitlines()]
    assert len({row["response"] for row in last}) == 32  # no two are the same
    words = [len(set(row["response"].split())) / len(row["response"].split()) for row in last]
    assert mean(words) > 0.6  # nor do they repeat one happy word
