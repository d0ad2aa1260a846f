"""`rlhf stage=audit`: what a long run takes for granted, tried out on a user's model, tokenizer, data and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.data.datamodules import KINDS
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.audit.data import IDS_FIT, DataChecks
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.evaluation.audit.reward import RewardChecks
from rlhf_lightning.files import write_json
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.runtime.run import Run

STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}


def run(run: Run) -> float:
    """Print a verdict per line, write them to audit.json, and raise a UserError when a check failed."""
    console = Console()
    folder = run.start_folder()
    data = run.data(folder, audited_data(run))
    given = run.settings["data"]["train"]
    console.print(f"[bold]audit[/bold] of {folder}, {data.kind} of {given}", soft_wrap=True)
    verdicts: list[dict[str, str]] = []
    for title, check in checks(run, folder, data):
        state, detail = judge(check)
        verdicts.append({"check": title, "verdict": state, "detail": detail})
        console.print(f"[{STYLES[state]}]{state:4}[/]  {title}: ", end="")
        console.print(detail, markup=False, highlight=False, soft_wrap=True)
        if state == "FAIL" and (not data.rows or title.endswith(IDS_FIT)):
            break  # there is nothing the model could read
    failed = sum(verdict["verdict"] == "FAIL" for verdict in verdicts)
    write_json(run.folder / "audit.json", verdicts)
    write_json(run.folder / "metrics.json", {"monitor": "failed", "failed": failed, "checks": len(verdicts)})
    console.print(f"run         {run.folder}", soft_wrap=True)
    if failed:
        raise UserError(f"{failed} of {len(verdicts)} checks failed: see the lines marked FAIL")
    return 0.0


def audited_data(run: Run) -> Any:
    """Return the configuration of the data module that the choice of `data` names: data=prompts/jsonl has prompts."""
    kind = HydraConfig.get().runtime.choices["data"].partition("/")[0]
    if kind == "world":
        kind = run.settings["data"]["world"]["records"] or "preferences"
    targets = {of: target for target, of in KINDS.items()}
    if kind not in targets:
        raise UserError(f"stage=audit reads {', '.join(targets)}; data.world.records={kind} is none of them")
    return OmegaConf.create({**run.settings["data"], "_target_": targets[kind]})


def judge(check: Callable[[], str]) -> tuple[str, str]:
    """Return the verdict of a check and what it saw."""
    try:
        detail = check()
    except UserError as error:
        return "FAIL", str(error)
    return ("note" if isinstance(detail, Note) else "ok"), str(detail)


def checks(run: Run, folder: str, data: Any) -> Iterator[Check]:
    """Yield every check of a run, in the order of their cost; what a check needs is loaded when it is its turn."""
    options, settings = run.options, run.settings
    rows = DataChecks(data, options["rows"])
    yield "every row can be read", rows.read
    model = ModelChecks(
        partial(load_causal_lm, folder, **settings["model"]["load"]),
        settings["adapter"],
        data,
        rows.looked_at(),
        run.build("sampler"),
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        seed=settings["seed"],
        device=run.device,
    )
    yield from rows.checks(model.vocabulary)
    yield from model.checks()
    reward = run.reward("reward_from")
    if reward is not None:
        yield from RewardChecks(reward, rows, model).checks()
