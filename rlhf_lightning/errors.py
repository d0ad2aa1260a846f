"""The one exception a user is meant to see, and what raises it everywhere."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in a command, a config, a file or a data row, reported in one readable message."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the option closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def check_number(key: str, value: Any, interval: str, whole: bool = False) -> None:
    """Raise a UserError that names `key` unless `value` is a finite number in `interval`, such as "[0, 1)".

    Args:
        whole: only integers are allowed.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if number and math.isfinite(value):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            return
    raise UserError(f"{key}={value} is not a {'whole' if whole else 'finite'} number in {interval}")


def needs(module: str, extra: str) -> Any:
    """Import and return a module of an extra of this package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        package = {"crowdkit": "crowd-kit", "sklearn": "scikit-learn"}.get(top, top)
        raise UserError(f"{package} is not installed: pip install 'rlhf-lightning[{extra}]'") from error
