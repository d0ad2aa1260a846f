"""`rlhf stage=report`: a page of what a pipeline or a run has stored."""

from __future__ import annotations

from rich.console import Console

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.report.page import write_report
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> None:
    """Write report.html and report.json into the run folder."""
    given = run.options["folder"]
    if not given:
        raise UserError("report.folder: a value is needed, the folder of a pipeline or of a run, or a list of them")
    folders = [str(folder) for folder in given] if isinstance(given, list) else [str(given)]
    page = write_report(folders, run.folder)
    Console().print(f"report      {page}", soft_wrap=True)
