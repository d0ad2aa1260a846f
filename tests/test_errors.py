"""What raises a UserError everywhere."""

from __future__ import annotations

import sys

import pytest

from rlhf_lightning.errors import UserError, needs
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages.run import check_effects


@pytest.mark.parametrize(("module", "package"), [("crowdkit.aggregation", "crowd-kit"), ("openai", "openai")])
def test_a_missing_extra_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(UserError, match=rf"^{package} is not installed: pip install 'rlhf-lightning\[judge\]'$"):
        needs(module, "judge")
    assert needs("json", "judge") is sys.modules["json"]


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        (
            "evaluate",
            "card.license=mit",
            r"^card\.license is of the model that a run writes, and stage=evaluate writes none$",
        ),
        ("candidates", "card.data_license=mit", "^card.data_license is of"),
        (
            "sft",
            "callbacks.histograms.every_n_iterations=5",
            r"every_n_iterations is of rollouts, and stage=sft has none$",
        ),
        ("evaluate", "+callbacks.histograms.every_n_iterations=5", "stage=evaluate has none$"),
    ],
)
def test_what_a_stage_has_no_use_for_is_refused(
    stage: str, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLHF_PIPELINE_STAGE", raising=False)
    with pytest.raises(UserError, match=message):
        check_effects(STAGES[stage], ["seed=1", override])
    check_effects(
        STAGES["ppo"], ["card.license=mit", "callbacks.histograms.every_n_iterations=5", "~callbacks.histograms"]
    )
    check_effects(STAGES["sft"], ["card.license=mit", "~callbacks.histograms", "callbacks.histograms=null"])
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_PIPELINE_STAGE", "evaluate")  # a pipeline gives it to all of its stages
        check_effects(STAGES[stage], [override])
