"""docs/metrics.md lists every tag that a run writes, and no other."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, OnlineDPO, PreferenceData, PromptData, RewardModel
from rlhf_lightning.callbacks.histograms import Histograms
from rlhf_lightning.callbacks.loggers import write_hparams
from rlhf_lightning.callbacks.samples import Samples
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.rewards.scoring import load_reward
from rlhf_lightning.world import measures, rows
from tests.helpers.lightning import quiet_lightning

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
DATA = {
    "sft": DemonstrationData,
    "reward": PreferenceData,
    "dpo": PreferenceData,
    "ppo": PromptData,
    "online_dpo": PromptData,
}
EVALUATED = {
    "reward",
    "kl",
    "kl_k3",
    "length",
    "ended_with_eos",
    "accuracy",
    "accuracy_mean",
    "shorter_accuracy",
    "length_controlled_accuracy",
    "length_pearson",
    "length_spearman",
    "calibration_error",
    "brier",
    "best_of_accuracy",
    "reward_bench",
    "format_flipped",
    "ngrams_found",
    "reward_disagreement",
}  # beside those of the world
EVALUATED |= {"characters", "pass_at_<k>", "majority_at_<k>", "reward_failed", "gold_failed"}
EVALUATED |= {f"{by}_rating" for by in ("gold", "reward", "judge")}
EVALUATED |= {f"{metric}_{of}" for metric in ("gold", "reward", "accuracy") for of in ("<group>", "worst")}
GROUPS = ("cautious", "curious")
ELSEWHERE = {
    "global_step",
    "monitor",
    "evaluation",
    "differences",
    "groups",
    "pairs",
    "win_rates",
    "ratings",
    "overoptimization",
    "val/gold_smoothed",
}  # in metrics.json, or written by the evaluate stage


def glossary() -> list[str]:
    """Return the tags in the first column of the page's tables."""
    cells = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell)]


class WithLogprobs(LocalEngine):
    """An engine that gives log-probabilities, as one elsewhere does."""

    def generate(self, *args: Any, **options: Any) -> Any:
        found = super().generate(*args, **options)
        return replace(found, logprobs=[[0.0] * len(y) for y in found.responses])


def modules(start: str) -> dict[str, LightningModule]:
    common: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "schedule": schedule}
    lm, gold = partial(load_causal_lm, start), load_reward({name: f"world:{name}" for name in GROUPS})
    ensemble = load_reward([f"world:{name}" for name in GROUPS])
    return {
        "sft": SFT(lm, **common),
        "reward": RewardModel(partial(load_scalar_model, start), groups=GROUPS, **common),
        "dpo": DPO(lm, sft_coef=0.1, **common),
        "ppo": PPO(lm, reward=gold, gold=gold, max_new_tokens=4, ptx_coef=0.1, engine=WithLogprobs(), **common),
        "online_dpo": OnlineDPO(lm, reward=ensemble, gold=gold, max_new_tokens=4, **common),
    }


def logged(stage: str, start: str, folder: Path) -> set[str]:
    """Train `stage` for two steps and return what it wrote, as metrics and to TensorBoard."""
    options: dict[str, Any] = {"ptx": "world", "ptx_batch_size": 2} if stage == "ppo" else {}
    data = DATA[stage](
        load_tokenizer(start), "world", "world", batch_size=4, row_tokens=128, cache_dir=folder / "cache",
        world={"rows": 8, "val_rows": 4, "labeller": {"group": dict.fromkeys(GROUPS, 0.5)}}, **options,
    )  # fmt: skip
    module, throughput = modules(start)[stage], Throughput()
    logger = TensorBoardLogger(str(folder), name="", version="tensorboard", default_hp_metric=False)
    monitor = "val/reward" if DATA[stage] is PromptData else "val/loss"
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1, num_sanity_val_steps=0,
        callbacks=[throughput, Samples(folder / "samples", 1, 2, 4), Histograms()],
    )  # fmt: skip
    trainer.fit(module, data)
    write_hparams(trainer, {"stage": stage}, monitor, trainer.callback_metrics[monitor].item())
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = {*events.Tags()["scalars"], *events.Tags()["histograms"]}
    tags |= {t.removesuffix("/text_summary") for t in events.Tags()["tensors"]}
    tags = {t for t in tags if not t.startswith("_hparams_")} | set(trainer.callback_metrics) | set(throughput.summary)
    tags = {re.sub(f"_({'|'.join(GROUPS)})$", "_<group>", tag) for tag in tags}
    return {"hparams/<monitor>" if tag == f"hparams/{monitor}" else tag for tag in tags}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    folder = tmp_path_factory.mktemp("start") / "model"
    return build_tiny(folder, texts, vocab_size=300, hidden_size=32, layers=2, heads=2)


@pytest.mark.slow
@quiet_lightning
def test_the_training_stages_log_what_the_page_lists(start: str, tmp_path: Path) -> None:
    found: set[str] = set()
    for stage in DATA:
        tags = logged(stage, start, tmp_path / stage)
        assert {"optim/lr", "optim/grad_norm", "perf/rows_per_s", "perf/peak_memory_gb", "samples"} <= tags, stage
        found |= tags
    listed = {tag for tag in glossary() if not re.search("<(model|curve|figure)>", tag)} - ELSEWHERE
    assert found - listed == set(), "tags that docs/metrics.md does not explain"
    assert listed - found == set(), "tags on the page that no stage logs"


def test_the_evaluation_tags_are_those_of_the_world() -> None:
    world = list(rows("prompts", 300))
    found = {name for row in world for name in measures(row, "Yes.")} | EVALUATED
    families = {row["family"] for row in world}
    listed = {tag.partition("/")[2] for tag in glossary() if tag.startswith("<model>/")}
    assert {"gold_<family>" if name.removeprefix("gold_") in families else name for name in found} == listed


def test_no_tag_is_listed_twice() -> None:
    tags = glossary()
    assert len(tags) == len(set(tags)) > 60
