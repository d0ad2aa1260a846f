"""Libraries of the extra `agreement`, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_lightning.errors import UserError

PACKAGES = {"crowdkit": "crowd-kit", "sklearn": "scikit-learn"}
"""Names of modules -> names of what is installed, where they differ."""


def needs(module: str) -> Any:
    """Import and return a module of the extra `agreement`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise UserError(
            f"{PACKAGES.get(top, top)} is not installed: pip install 'rlhf-lightning[agreement]'"
        ) from error
