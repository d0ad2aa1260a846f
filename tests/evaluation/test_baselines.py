"""The baselines of reward models: the longer response, and a bag of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.baselines import bag_of_words, longer
from rlhf_lightning.evaluation.reward_model import TextPair, accuracies, evaluate_reward_model, text_pairs
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.statistics import share_interval
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from tests.helpers.compose import composed

WORDS = [f"word{number}" for number in range(30)]


def test_accuracy_and_that_where_the_shorter_response_is_better() -> None:
    pairs = [TextPair(0, "long text", "x"), TextPair(1, "x", "longer"), TextPair(1, "a", "bb"), TextPair(2, "cc", "dd")]
    assert longer(pairs).tolist() == [8, -5, -1, 0]
    table = accuracies(torch.tensor([1.0, -1.0, 2.0, 0.0]), pairs)
    assert table["accuracy"] == share_interval([1, 0, 1, 0.5], [0, 1, 1, 2])
    assert table["shorter_accuracy"] == share_interval([0, 1], [1, 1])
    assert accuracies(longer(pairs), pairs)["accuracy"][0] == (1 + 0 + 0 + 0.5) / 4
    assert "shorter_accuracy" not in accuracies(torch.ones(1), pairs[:1])


def planted(count: int, seed: int) -> list[TextPair]:
    """Pairs whose better response has the word good, at random lengths."""
    rng, pairs = random.Random(seed), []
    for number in range(count):
        texts = [rng.choices(WORDS, k=rng.randint(3, 12)) for _ in range(2)]
        texts[0].insert(rng.randrange(3), "good")
        pairs.append(TextPair(number, *(" ".join(text) for text in texts)))
    return pairs


def test_a_bag_of_words_learns_a_word() -> None:
    held_out = planted(300, 1)
    judge = bag_of_words(planted(300, 0))
    assert (judge(held_out) > 0).float().mean() > 0.9
    assert 0.35 < (longer(held_out) > 0).float().mean() < 0.65
    swapped = [TextPair(pair.prompt, pair.worse, pair.better) for pair in held_out]
    torch.testing.assert_close(judge(swapped), -judge(held_out))  # it has no preference for a place


def test_a_bag_of_words_needs_words() -> None:
    with pytest.raises(UserError, match="of 2 pairs nothing can be learned"):
        bag_of_words(planted(2, 0))


def ranked(path: Path, count: int, seed: int) -> str:
    rows = []
    for pair in planted(count, seed):
        responses = [pair.better, pair.worse, "word0"]
        rows.append({"prompt": f"ask {pair.prompt}", "responses": responses, "ranking": [0, 1, 1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a reward model with random weights."""
    root = tmp_path_factory.mktemp("judge")
    start = build_tiny(root / "start", WORDS * 4, vocab_size=300, hidden_size=32, layers=2, heads=2)
    model = load_scalar_model(start)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(root / "judge")
    load_tokenizer(start).save_pretrained(root / "judge")
    return str(root / "judge")


@pytest.mark.slow
def test_scores_and_texts_are_of_the_same_pairs(judge: str, tmp_path: Path) -> None:
    """Several groups to a batch: a reward model that counts characters is as good as the longer response."""
    data = PreferenceData(load_tokenizer(judge), None, val=ranked(tmp_path / "rows.jsonl", 40, 0), batch_size=8)
    data.setup()
    pairs = [pair for row in range(40) for pair in text_pairs(data.group("val", row), data.template)]
    assert [(p.better, p.worse) for p in pairs[:2]] == [
        (planted(40, 0)[0].better, planted(40, 0)[0].worse),
        (planted(40, 0)[0].better, "word0"),
    ]

    class Counting(torch.nn.Module):
        """Scores a response with its number of characters."""

        def forward(self, batch: Any) -> torch.Tensor:
            lengths: list[int] = []
            for number in batch.index.tolist():
                lengths += [len(data.template.decode(ids)) for ids in data.group("val", number).responses]
            return torch.tensor(lengths, dtype=torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lightning.evaluation.reward_model.ScalarModel", lambda _: Counting())
        table, count = evaluate_reward_model(load_scalar_model(judge, trained=True), data)
    assert count == len(pairs) == 80
    assert table == accuracies(longer(pairs), pairs)
    assert 0 < table["shorter_accuracy"][1] < table["accuracy"][0] or table["shorter_accuracy"][0] == 0


@pytest.mark.slow
def test_the_stage_shows_them_beside_the_reward_model(
    judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(
        "stage=evaluate", f"evaluate.preferences={ranked(tmp_path / 'val.jsonl', 60, 1)}", f"paths.run={tmp_path}",
        f"evaluate.bag_of_words={ranked(tmp_path / 'train.jsonl', 200, 0)}", f"paths.cache={tmp_path / 'cache'}",
        "data.val_rows=50", f"init_from={judge}",
    )  # fmt: skip
    stage.run(Run(STAGES["evaluate"], cfg, tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bag_of_words/accuracy"] > 0.8 > metrics["longer/accuracy"]
    assert metrics["longer/shorter_accuracy"] == 0
    assert metrics["monitor"] == "model/accuracy"
    printed = capsys.readouterr().out
    assert "held-out pairs" in printed
    assert "held-out prompts" not in printed  # its accuracy is in one table
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("│ ")][-3:] == [
        "model",
        "longer",
        "bag_of_words",
    ]
    with open_dict(cfg):
        cfg.init_from, cfg.evaluate.models = None, {"longer": judge}
    with pytest.raises(UserError, match=r"evaluate\.models\.longer: this is the name of a baseline"):
        stage.run(Run(STAGES["evaluate"], cfg, tmp_path))
