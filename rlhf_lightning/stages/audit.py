"""`rlhf stage=audit`: checks of a user's model, tokenizer, data and reward before a long run."""

from __future__ import annotations

from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from rlhf_lightning.data.datamodules import KINDS
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.evaluation.audit.report import audit
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> float:
    """Check model, data and reward; raise a UserError when a check failed."""
    folder, options, settings = run.start_folder(), run.options, run.settings
    for key in ("rows", "max_new_tokens"):
        check_number(f"audit.{key}", options[key], "[1, inf)", whole=True)
    check_number("audit.temperature", options["temperature"], "[0, inf)")
    data = run.data(folder, audited_data(run))
    Console().print(f"[bold]audit[/bold] of {folder}, {data.kind} of {settings['data']['train']}", soft_wrap=True)
    Console().print(f"run         {run.folder}", soft_wrap=True)

    def model(count: int) -> ModelChecks:
        return ModelChecks(
            partial(load_causal_lm, folder, **settings["model"]["load"]),
            settings["adapter"],
            data,
            count,
            run.build("sampler"),
            max_new_tokens=options["max_new_tokens"],
            temperature=options["temperature"],
            seed=settings["seed"],
            device=run.device,
        )

    return audit(run.folder, data, options["rows"], model, partial(run.reward, "reward_from"))


def audited_data(run: Run) -> dict[str, Any]:
    """Return the settings of the data module that the choice of `data` names: data=prompts/jsonl has prompts."""
    kind = HydraConfig.get().runtime.choices["data"].partition("/")[0]
    if kind == "world":
        kind = run.settings["data"]["world"]["records"] or "preferences"
    targets = {of: target for target, of in KINDS.items()}
    if kind not in targets:
        raise UserError(f"stage=audit reads {', '.join(targets)}; data.world.records={kind} is none of them")
    return {**run.settings["data"], "_target_": targets[kind]}
