"""`rlhf stage=compare`: two or more pipelines side by side on one page."""

from __future__ import annotations

from rich.console import Console

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.report.compare import named, write_comparison
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> None:
    """Write compare.html and compare.json into the run folder."""
    given = run.options["folders"]
    if isinstance(given, list):
        given = named([str(folder) for folder in given])
    if not isinstance(given, dict) or len(given) < 2:
        raise UserError(
            "compare.folders: two folders of pipelines or runs are needed, [one,two] or {name:one,other:two}"
        )
    page = write_comparison({str(name): str(folder) for name, folder in given.items()}, run.folder)
    Console().print(f"comparison  {page}", soft_wrap=True)
