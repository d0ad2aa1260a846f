"""What stage=evaluate measured of the models of a pipeline, added to their model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_lightning.evaluation.report.store import Stage, read_results, subdict
from rlhf_lightning.files import atomic_path, regular
from rlhf_lightning.models.card import with_evaluations


def write_evaluations(folder: str | Path) -> list[Path]:
    """Add the stored metrics of a pipeline's evaluations to the cards of its models, and return the cards written.

    A card is written again only where it changes. The hash of a model's folder does not cover its card.

    Raises:
        UserError: the folder holds no pipeline, or a card cannot be written.
    """
    results = read_results(folder)
    written = []
    for stage in results.stages:
        card = stage.folder / "model" / "README.md"
        evaluations = {
            f"{results.name}/{Path(folder).resolve().name}/{other.folder.name}": metrics
            for other in results.stages
            if (metrics := measured(other, card.parent))
        }
        if not evaluations or not card.is_file():
            continue
        before = regular(card).read_text(encoding="utf-8", errors="replace")
        after = with_evaluations(before, evaluations)
        if after != before:
            with atomic_path(card) as temporary:
                temporary.write_text(after, encoding="utf-8")
                temporary.chmod(0o644)
            written.append(card)
    return written


def measured(stage: Stage, model: Path) -> dict[str, Any]:
    """Return the metrics that an evaluation stored of the model in a folder, without the name that it called it by."""
    if not stage.models:
        return {}
    given = {"model": stage.config.get("init_from")} | subdict(subdict(stage.config, "evaluate"), "models")
    names = [name for name, of in given.items() if isinstance(of, str) and Path(of).resolve() == model.resolve()]
    return {
        key.removeprefix(f"{name}/"): value
        for name in names
        for key, value in stage.metrics.items()
        if key.startswith(f"{name}/")
    }
