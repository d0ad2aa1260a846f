"""`stage=probe` as a command: files, resume, messages; the callback changes nothing; the configuration."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, PreferenceData, PromptData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.probes import PROBES
from rlhf_lightning.evaluation.probes.callback import Probes
from rlhf_lightning.evaluation.probes.probe import Result
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.rewards.scoring import load_reward
from rlhf_lightning.runtime.explain import explain
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.settings import check_groups, groups
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import probe as stage
from rlhf_lightning.stages.probe import as_json, measured
from tests.helpers.cli import newest, rlhf
from tests.helpers.compose import composed
from tests.helpers.lightning import quiet_lightning

RESULT = Result(
    {"a": (0.5, float("nan"), float("nan"))}, [{"prompt": "p", "response": "r", "a": 0.5}], {"t": [{"x": 1}]}
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_command_writes_what_the_report_reads(chat_folder: Path, tmp_path: Path) -> None:
    command = ["stage=probe", "probe=[refusal,diversity]", "probe.data=world", "probe.rows=10", "probe.max_new_tokens=4",
               f"+probe.models.one={chat_folder}", f"+probe.models.two={chat_folder}", f"probe.reference={chat_folder}", "logger=csv"]  # fmt: skip
    done = rlhf(tmp_path, *command)
    run = newest(tmp_path, "probe")
    metrics, table = json.loads((run / "metrics.json").read_text()), read(run / "tables" / "probes.jsonl")
    assert {(row["model"], row["probe"]) for row in table} == {
        (m, p) for m in ("one", "two") for p in ("refusal", "diversity")
    }
    for row in table:
        key = f"{row['model']}/{row['probe']}/{row['metric']}"
        assert metrics[key] == row["value"]
        assert metrics.get(f"{key}_low") == row["low"]
        if row["metric"].endswith("_change"):  # to itself
            assert (row["value"], row["alarm"]) == (0, None)
    assert metrics["alarms"] == 0
    samples = read(run / "samples" / "refusal.jsonl")
    assert {row["model"] for row in samples} == {"one", "two"}
    assert {"prompt", "response"} <= samples[0].keys()
    assert not (run / "parts").exists()
    assert "no alarm" in done.stdout
    assert "already done" in rlhf(tmp_path, *command, "resume=auto").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose what to measure: probe= one of verbosity"),
        (["probe=all", "probe.data={rows}"], "has the columns of one probe, and"),
        (["probe=refusal", "data=world"], "stage=probe reads probe.data (world, or a file), not data.train"),
        (["probe=refusal", "gold_from=world"], "gold_from was given, and probe=refusal does not use it"),
        (["probe=refusal", "+probe.refusal.x=1"], "probe.refusal.x: there is no such option; its options: none"),
        (["probe=all", "probe.tax.pass_at=8"], "probe.tax.pass_at=8 is not a whole number in [1, 4]"),
        (["probe=all", "probe.temperature=0"], "probe=diversity compares samples, and with probe.temperature=0"),
        (["probe=all", "probe.jailbreaks.families=[sufix]"], "'sufix' is not one of persona, role_play, turns, suffix"),
        (["probe=refusal", "probe.reference=nowhere"], "the model 'nowhere' is neither a local folder nor"),
        (["probe=refusal", "probe.rows=0"], r"probe.rows=0 is not a whole number in [1, inf)"),
        (["probe=refusal", "probe.data={rows}"], "rows.jsonl, row 1: it has no label"),
    ],
)
def test_mistakes_are_one_line(
    chat_folder: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?"}\n')
    arguments = [argument.format(rows=tmp_path / "rows.jsonl") for argument in arguments]
    monkeypatch.setattr(stage, "load_subject", None)  # all of it is said before a model is loaded
    cfg = composed("stage=probe", f"init_from={chat_folder}", "logger=none", f"paths.cache={tmp_path}", *arguments)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        STAGES["probe"].load()(Run(STAGES["probe"], cfg, tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_another_stage_has_no_probes() -> None:
    check_groups(composed("stage=probe", "probe=refusal"))
    check_groups(composed("stage=probe"))
    with pytest.raises(UserError, match="probe= is for stage=probe; during training: callbacks=probes"):
        check_groups(composed("stage=sft", "probe=refusal"))


def test_a_wrong_probe_in_a_list_is_named() -> None:
    message = explain(Exception("In 'rlhf': Could not load 'probe/refusl'."), ["stage=probe", "probe=[hhh,refusl]"])
    assert message.startswith("probe=refusl is not one of: all, ")
    assert message.endswith("Did you mean 'refusal'?")


def test_what_is_done_is_not_measured_again(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def measure(name: str, subject: str) -> Result:
        if (subject, name) == ("two", "b"):
            raise KeyboardInterrupt
        asked.append((subject, name))
        return RESULT

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, ["one", "two"], ["a", "b"], str, measure)
    assert asked == [("one", "a"), ("one", "b"), ("two", "a")]
    loaded: list[str] = []
    found = measured(
        tmp_path,
        ["one", "two"],
        ["a", "b"],
        lambda m: loaded.append(m) or m,
        lambda n, m: asked.append((m, n)) or RESULT,
    )
    assert asked[3:] == [("two", "b")]
    assert loaded == ["two"]
    assert all(repr(result) == repr(RESULT) for result in found.values())  # NaN included


def test_a_result_has_no_nan_on_disk() -> None:
    assert "NaN" not in json.dumps(as_json(RESULT))


@pytest.mark.slow
def test_every_probe_is_an_option_with_its_settings() -> None:
    assert set(groups()["probe"]) == {*PROBES, "all"}
    every = composed("stage=probe", "probe=all").probe
    for name, probe in PROBES.items():
        cfg = composed("stage=probe", f"probe={name}").probe
        assert dict(cfg[name]) == dict(probe.settings)
        assert dict(every[name]) == dict(probe.settings)
        assert not (set(PROBES) - {name}) & set(cfg)
    assert not set(PROBES) & set(composed("stage=probe").probe)


# ---- the callback --------------------------------------------------------------------------------------------------


class Drawing(LocalEngine):
    """Draws from the random states of the process, as another engine may."""

    def generate(self, *args: Any, **options: Any) -> Any:
        torch.rand(1)
        random.random()
        return super().generate(*args, **options)


def trained(stage: str, chat_folder: Path, place: Path, probes: bool) -> Any:
    """Train two steps, with dropout, and return the module."""
    lm = partial(load_causal_lm, str(chat_folder), dropout=0.1 if stage == "sft" else 0.0)
    common: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-3)}
    gold = load_reward("world")
    module = {
        "sft": lambda: SFT(lm, **common),
        "dpo": lambda: DPO(lm, **common),
        "ppo": lambda: PPO(lm, reward=gold, gold=gold, max_new_tokens=4, **common),
        "reward": lambda: RewardModel(partial(load_scalar_model, str(chat_folder)), **common),
    }[stage]()
    kind = {"sft": DemonstrationData, "ppo": PromptData}.get(stage, PreferenceData)
    data = kind(
        load_tokenizer(str(chat_folder)),
        "world",
        batch_size=4,
        row_tokens=128,
        cache_dir=place / "cache",
        world={"rows": 8},
    )
    callback = Probes(
        place / "probes",
        ["refusal", "verbosity"],
        every_n_steps=1,
        data="world",
        rows=6,
        max_new_tokens=3,
        sampler=Drawing(),
    )
    torch.manual_seed(0)
    logger = CSVLogger(str(place), name="", version="csv") if probes else False
    trainer = Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", logger=logger, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=1,
        callbacks=[callback] if probes else [],
    )  # fmt: skip
    trainer.fit(module, data)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
@quiet_lightning
def test_training_with_probes_ends_bit_equal(stage: str, chat_folder: Path, tmp_path: Path) -> None:
    with_probes = trained(stage, chat_folder, tmp_path, True)
    draw = torch.rand(3)
    without = trained(stage, chat_folder, tmp_path, False)
    assert torch.equal(draw, torch.rand(3))
    for name, weight in with_probes.state_dict().items():
        assert torch.equal(weight, without.state_dict()[name]), name
    assert with_probes.training == without.training
    files = sorted(path.name for path in (tmp_path / "probes").iterdir())
    steps = [0, 4] if stage == "ppo" else [0, 1, 2]  # an iteration of PPO makes four updates
    assert files == [f"step_00000{n}{kind}.jsonl" for n in steps for kind in ("", "_refusal", "_verbosity")]
    logged = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"probe/refusal/over_refused", "probe/verbosity/words"} <= set(logged)
    assert ("probe/verbosity/gold" in logged) == (stage == "ppo")  # an online stage has the rewards that it trains with


@quiet_lightning
def test_a_reward_model_is_no_subject(chat_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="callbacks.probes asks a language model, and RewardModel trains none"):
        trained("reward", chat_folder, tmp_path, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": []}, "callbacks.probes.probes is empty"),
        ({"probes": ["refusl"]}, "Did you mean 'refusal'"),
        ({"probes": ["refusal", "tax"], "data": "x.jsonl"}, "has the columns of one probe"),
        ({"probes": ["tax"], "settings": {"tax": {"k": 1}}}, "probe.tax.k: there is no such option"),
    ],
)
def test_options_of_the_callback(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Probes(tmp_path, **options)
