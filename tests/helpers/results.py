"""Folders as stages leave them, with made-up results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Rows = Sequence[Mapping[str, Any]]


def stored_stage(
    folder: Path,
    kind: str,
    metrics: Mapping[str, Any] | None,
    *,
    parents: Mapping[str, str] | None = None,
    weights: str = "",
    config: Mapping[str, Any] | None = None,
    samples: Mapping[str, Rows] | None = None,
    tables: Mapping[str, Rows] | None = None,
) -> Path:
    """Write one run folder; `parents` maps a role to the hash of weights, `metrics=None` is of an unfinished run."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": kind, "fingerprint": "0", "output": "metrics.json"}))
    hydra(folder, {"stage": kind} | dict(config or {}), [f"stage={kind}", f"seed={len(folder.name)}"])
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if weights:
        entries = [{"role": role, "folder": "elsewhere", "weights": of} for role, of in (parents or {}).items()]
        manifest = {"stage": kind, "weights": weights, "seed": 0, "parents": entries, "created": "2026-01-02T03:04:05"}
        (folder / "model").mkdir()
        (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
    for place, of in (("samples", samples), ("tables", tables)):
        for name, rows in (of or {}).items():
            (folder / place).mkdir(exist_ok=True)
            (folder / place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hydra(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Write what Hydra writes of a run."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


def intervals(**values: tuple[float, float, float]) -> dict[str, float]:
    """Return the keys of metrics.json: `ppo__gold=(mean, low, high)` is ppo/gold; `__minus__` is the sign."""
    flat: dict[str, float] = {}
    for name, (mean, low, high) in values.items():
        key = name.replace("__minus__", "-").replace("__", "/")
        flat |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return flat


EVALUATED = intervals(
    base__gold=(-1.0, -1.1, -0.9), base__length=(40.0, 38.0, 42.0), base__kl=(48.0, 46.0, 50.0),
    base__ended_with_eos=(0.5, 0.4, 0.6),
    sft__gold=(0.1, 0.0, 0.2), sft__length=(20.0, 19.0, 21.0), sft__kl=(0.0, 0.0, 0.0), sft__reward=(0.3, 0.2, 0.4),
    ppo__gold=(0.12, 0.0, 0.24), ppo__length=(28.0, 27.0, 29.0), ppo__kl=(1.1, 1.0, 1.2), ppo__reward=(0.9, 0.8, 1.0),
    base__minus__sft__gold=(-1.1, -1.2, -1.0), base__minus__sft__length=(20.0, 18.0, 22.0),
    ppo__minus__sft__gold=(0.02, -0.05, 0.09), ppo__minus__sft__length=(8.0, 7.0, 9.0),
    ppo__minus__sft__reward=(0.6, 0.5, 0.7),
    reward__accuracy=(0.8, 0.75, 0.85), longer__accuracy=(0.6, 0.55, 0.65),
)  # fmt: skip


def answers(**responses: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return samples of models: the gold reward of a response is the number that it begins with."""
    return {
        name: [
            {"prompt": f"Question {place}?", "response": text, "gold": float(text.split()[0]), "length": len(text)}
            for place, text in enumerate(of)
        ]
        for name, of in responses.items()
    }


def stored_pipeline(folder: Path, **evaluate: Any) -> Path:
    """Write a pipeline of base, sft, reward, ppo and evaluate; `evaluate` replaces what is stored of the last."""
    names = ("base", "sft", "reward", "ppo", "evaluate")
    hydra(folder, {"pipeline": {"name": "made", "stages": {name: {} for name in names}}}, ["pipeline=made"])
    trained = {"monitor": "val/loss", "val/loss": 0.5, "global_step": 10}
    stored_stage(folder / "0_base", "sft", trained, weights="b" * 64)
    stored_stage(folder / "1_sft", "sft", trained, weights="5" * 64, parents={"init": "b" * 64})
    stored_stage(folder / "2_reward", "reward", trained, weights="4" * 64, parents={"init": "5" * 64})
    stored_stage(folder / "3_ppo", "ppo", trained, weights="7" * 64, parents={"init": "5" * 64, "reward": "4" * 64})
    models = {name: str(folder / f"{place}_{name}" / "model") for place, name in enumerate(names[:4])}
    given: dict[str, Any] = {
        "metrics": EVALUATED | {"monitor": "ppo/gold"},
        "config": {"evaluate": {"models": models}},
        "samples": answers(base=["0 a", "0 b"], sft=["1 short", "1 also"], ppo=["1 short", "-1 other"]),
    } | evaluate
    stored_stage(folder / "4_evaluate", "evaluate", given.pop("metrics"), **given)
    return folder
