"""What is used of peft, which imports bitsandbytes where that is installed.

On some CPUs bitsandbytes then asks the package `kernels` for code from the hub, which is not run here.
"""

import logging
import sys

kernels, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes")
sys.modules["kernels"] = None  # type: ignore[assignment]
logger.setLevel(logging.ERROR)  # it warns that the code was not found
try:
    from peft import (
        LoraConfig,
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer
finally:
    logger.setLevel(logging.NOTSET)
    del sys.modules["kernels"]
    if kernels is not None:
        sys.modules["kernels"] = kernels

__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
