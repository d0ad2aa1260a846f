"""What `reward_from` and `gold_from` mean."""

from __future__ import annotations

import hashlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def code_key(spec: Any) -> str | None:
    """Return a digest of the file of a reward `module:function`, found like an import but not imported; else None.

    What that file imports does not count.
    """
    module, _, name = str(spec).partition(":")
    found, path = None, [str(Path.cwd()), *sys.path]
    for part in module.split(".") if name else []:
        found = PathFinder.find_spec(part, path)
        path = list(found.submodule_search_locations or []) if found else []
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()
