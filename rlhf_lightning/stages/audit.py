"""The audit stage: what a long run takes for granted, tried out on a user's own model, tokenizer, data and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.audit.data import IDS_FIT, DataChecks
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.evaluation.audit.reward import RewardChecks
from rlhf_lightning.files import write_json
from rlhf_lightning.models.loading import context_length, load_tokenizer

STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}


def run_audit(settings: dict[str, Any], run: Path, folder: str, make_data: Callable[..., Any]) -> float:
    """Print a verdict a line, write them to audit.json, and raise a UserError when a check failed.

    Args:
        settings: the plain configuration of the run.
        run: folder for audit.json and metrics.json.
        folder: the model to audit.
        make_data: builds the data module from a `tokenizer`.
    """
    console = Console()
    data = make_data(tokenizer=load_tokenizer(folder))
    data.limit_length(context_length(folder))
    source = data.sources["train"]
    named = f" of {source}" if isinstance(source, str) else ""
    console.print(f"[bold]audit[/bold] of {folder}, {data.kind}{named}", soft_wrap=True)
    verdicts: list[dict[str, str]] = []
    for title, check in checks(settings, folder, data):
        state, detail = judge(check)
        verdicts.append({"check": title, "verdict": state, "detail": detail})
        console.print(f"[{STYLES[state]}]{state:4}[/]  {title}: ", end="")
        console.print(detail, markup=False, highlight=False, soft_wrap=True)
        if state == "FAIL" and (not data.rows or title.endswith(IDS_FIT)):
            break  # there is nothing the model could read
    failed = sum(verdict["verdict"] == "FAIL" for verdict in verdicts)
    write_json(run / "audit.json", verdicts)
    write_json(run / "metrics.json", {"monitor": "failed", "failed": failed, "checks": len(verdicts)})
    console.print(f"run         {run}", soft_wrap=True)
    if failed:
        raise UserError(f"{failed} of {len(verdicts)} checks failed: see the lines marked FAIL")
    return 0.0


def judge(check: Callable[[], str]) -> tuple[str, str]:
    """Return the verdict of a check and what it saw."""
    try:
        detail = check()
    except UserError as error:
        return "FAIL", str(error)
    return ("note" if isinstance(detail, Note) else "ok"), str(detail)


def checks(settings: dict[str, Any], folder: str, data: Any) -> Iterator[Check]:
    """Yield every check of a run, in the order of their cost; what a check needs is loaded when it is its turn."""
    rows = DataChecks(data, settings["audit"]["rows"])
    yield "every row can be read", rows.read
    model = ModelChecks(settings, folder, data, rows.looked_at())
    yield from rows.checks(model.vocabulary)
    yield from model.checks()
    if settings["reward_from"]:
        yield from RewardChecks(settings, rows, model).checks()
