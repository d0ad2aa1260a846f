"""`rlhf stage=reward`: a reward model from preferences."""

from __future__ import annotations

from functools import partial

from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import train


def run(run: Run) -> float | None:
    """Train a sequence classifier with one output, or one for each group of annotators, on preferences."""
    folder, settings, options = run.start_folder(), run.settings, run.options
    if isinstance(options["groups"], str):
        options["groups"] = groups_of(run, options["groups"])
    load = partial(load_scalar_model, folder, seed=settings["seed"], **settings["model"]["load"])
    return train(run, folder, load, **options)


def groups_of(run: Run, value: str) -> list[str]:
    """Return the groups of annotators that the rows of data.train name, in alphabetical order.

    Raises:
        UserError: `value` is not "auto", or no row names a group.
    """
    if value != "auto":
        raise UserError(f"reward.groups={value} is not null, auto or a list of names.{nearest(value, ['auto'])}")
    source, columns = run.sources.get("data.train"), Columns(run.settings["data"].get("columns"))
    if source is None:
        raise UserError("reward.groups=auto reads the rows of data.train, which this data module has not; name them")
    views = (columns.view(row) for _, row in source.rows() if isinstance(row, dict))
    names = sorted({str(view["group"]) for view in views if view.get("group") not in (None, "")})
    if not names:
        raise UserError(
            f"reward.groups=auto: no row of {source.name} has a column group; data.columns.group=<column> names one"
        )
    return names
