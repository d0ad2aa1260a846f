"""Running the checks of an audit and reporting their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.audit.data import IDS_FIT, DataChecks
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.evaluation.audit.reward import RewardChecks
from rlhf_lightning.files import write_json
from rlhf_lightning.rewards.scoring import Reward

STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}


def audit(
    out: Path, data: RowData, rows: int, model: Callable[[int], ModelChecks], reward: Callable[[], Reward | None]
) -> float:
    """Print a verdict per line, write them to audit.json, and raise a UserError when a check failed.

    Args:
        out: folder for audit.json and metrics.json.
        data: a data module, not yet set up.
        rows: training rows that the model reads.
        model: builds the checks of the model from a number of rows.
        reward: returns the reward to check, or None. Both are called when it is their turn.
    """
    console = Console()
    verdicts: list[dict[str, str]] = []
    for title, check in checks(data, rows, model, reward):
        state, detail = judge(check)
        verdicts.append({"check": title, "verdict": state, "detail": detail})
        console.print(f"[{STYLES[state]}]{state:4}[/]  {title}: ", end="")
        console.print(detail, markup=False, highlight=False, soft_wrap=True)
        if state == "FAIL" and (not data.rows or title.endswith(IDS_FIT)):
            break  # there is nothing the model could read
    failed = sum(verdict["verdict"] == "FAIL" for verdict in verdicts)
    write_json(out / "audit.json", verdicts)
    write_json(out / "metrics.json", {"monitor": "failed", "failed": failed, "checks": len(verdicts)})
    if failed:
        raise UserError(f"{failed} of {len(verdicts)} checks failed: see the lines marked FAIL")
    return 0.0


def judge(check: Callable[[], str]) -> tuple[str, str]:
    """Return the verdict of a check and its detail."""
    try:
        detail = check()
    except UserError as error:
        return "FAIL", str(error)
    return ("note" if isinstance(detail, Note) else "ok"), str(detail)


def checks(
    data: RowData, rows: int, model: Callable[[int], ModelChecks], reward: Callable[[], Reward | None]
) -> Iterator[Check]:
    """Yield every check, in the order of their cost."""
    of_rows = DataChecks(data, rows)
    yield "every row can be read", of_rows.read
    of_model = model(of_rows.looked_at())
    yield from of_rows.checks(of_model.vocabulary)
    yield from of_model.checks()
    if (loaded := reward()) is not None:
        yield from RewardChecks(loaded, of_rows, of_model).checks()
