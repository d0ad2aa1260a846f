"""What Lightning and the loggers say about a setting, as one line."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.instantiate import missing_extra

log = logging.getLogger(__name__)
LIBRARIES = ("lightning", "mlflow", "wandb")
MISTAKES = (AttributeError, ImportError, KeyError, LookupError, RuntimeError, TypeError, ValueError)


def speaks(error: BaseException) -> str | None:
    """Return the library whose own code raised `error`, None where it came from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    loaded = {name: getattr(sys.modules.get(name), "__file__", None) for name in LIBRARIES}
    for name, file in loaded.items():
        if file and frames and Path(frames[-1].filename).is_relative_to(Path(file).parent):
            return name
    return None


@contextmanager
def readable_library_errors() -> Iterator[None]:
    """Raise what Lightning or a logger raised itself, such as a metric nobody logs, as a UserError; the log has all."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        library = speaks(error)
        ours = isinstance(error, MISTAKES) and library == "lightning"
        if not (ours or library in ("mlflow", "wandb") or isinstance(error, MisconfigurationException)):
            raise
        log.info("%s raised", library, exc_info=error)
        reason = missing_extra(error) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{library}: {reason[:400]}") from error
