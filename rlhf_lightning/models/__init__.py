"""Hugging Face models. peft is imported first, and with it bitsandbytes where that is installed.

On some CPUs bitsandbytes then asks the package `kernels` for code from the hub, which is not run here.
"""

import logging
import sys

kernels, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes")
sys.modules["kernels"] = None  # type: ignore[assignment]
logger.setLevel(logging.ERROR)  # it warns that the code was not found
try:
    import peft  # noqa: F401
finally:
    logger.setLevel(logging.NOTSET)
    del sys.modules["kernels"]
    if kernels is not None:
        sys.modules["kernels"] = kernels
