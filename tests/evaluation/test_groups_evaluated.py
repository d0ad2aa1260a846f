"""The evaluate stage by groups of people: gold, reward and accuracy of each, and the worst."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.evaluation.reward_model import of_groups
from rlhf_lightning.models.heads import with_heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.statistics import mean_interval, share_interval
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from rlhf_lightning.world import rows
from tests.helpers.compose import composed

GROUPS = ["cautious", "curious"]


def test_the_mean_over_groups_does_not_count_rows() -> None:
    correct = [1.0, 1.0, 0.0, 1.0, 0.0, 0.5]
    owners = ["a", "a", "a", "a", "b", None]
    found = of_groups(correct, list("pqrstu"), owners)
    assert found["accuracy_a"] == share_interval([1.0, 1.0, 0.0, 1.0], list("pqrs"))
    assert found["accuracy_mean"][0] == pytest.approx((0.75 + 0.0) / 2)
    assert found["accuracy_worst"] == found["accuracy_b"]
    assert found["accuracy_mean"][1] >= 0
    for alone in ([None] * 6, ["a"] * 6):
        assert of_groups(correct, list("pqrstu"), alone) == {}


def test_the_worst_group_is_the_one_with_the_lowest_mean() -> None:
    columns = {"gold": [0.5, 0.5], "gold_a": [1.0, 0.0], "gold_b": [0.0, 0.5]}
    evaluation = Evaluation(columns, [(0, 0), (1, 0)], [(1,), (2,)], [], {"gold": ["a", "b"]})
    table = evaluation.intervals()
    assert table["gold_worst"] == table["gold_b"] == mean_interval([0.0, 0.5])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of a language model and a reward model with two heads."""
    root = tmp_path_factory.mktemp("groups")
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    start = build_tiny(root / "start", texts, vocab_size=300, hidden_size=32, layers=2, heads=2)
    model = with_heads(lambda: load_scalar_model(start), GROUPS)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(root / "heads")
    load_tokenizer(start).save_pretrained(root / "heads")
    cfg = composed(
        "stage=evaluate", "data=world", "data.world.val_rows=48", f"paths.cache={root / 'cache'}",
        "evaluate.max_new_tokens=6", f"paths.run={root}", "evaluate.preferences=world",
        "data.world.labeller.group={cautious:0.5,curious:0.5}", "reward_groups=worst",
        "gold_from={cautious:world:cautious,curious:world:curious}", f"reward_from={root / 'heads'}",
    )  # fmt: skip
    with open_dict(cfg):
        cfg.evaluate.models = {"lm": start, "rm": str(root / "heads")}
    stage.run(Run(STAGES["evaluate"], cfg, root))
    return root


def test_every_group_has_its_figures(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    samples = [json.loads(line) for line in (run / "samples" / "lm.jsonl").read_text().splitlines()]
    means: dict[str, Any] = {}
    for metric in ("gold", "reward"):
        for name in GROUPS:
            means[name] = sum(row[f"{metric}_{name}"] for row in samples) / len(samples)
            assert metrics[f"lm/{metric}_{name}"] == pytest.approx(means[name], abs=1e-6)
            assert metrics[f"lm/{metric}_{name}_low"] <= means[name] <= metrics[f"lm/{metric}_{name}_high"]
        assert metrics[f"lm/{metric}_worst"] == pytest.approx(min(means.values()), abs=1e-6)
    for row in samples:
        assert row["gold"] == pytest.approx((row["gold_cautious"] + row["gold_curious"]) / 2, abs=1e-6)
        assert row["reward"] == pytest.approx(min(row["reward_cautious"], row["reward_curious"]), abs=1e-6)
    assert "lm/correct" in metrics  # what the world measures besides
    accuracies = [metrics[f"rm/accuracy_{name}"] for name in GROUPS]
    assert metrics["rm/accuracy_worst"] == min(accuracies)
    assert metrics["rm/accuracy_mean"] == pytest.approx(sum(accuracies) / 2)


def test_groups_are_a_table_of_their_own(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "groups/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("groups/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "gold, cautious" in text
    assert "accuracy, worst group" in text
