"""Every planted fault is caught and every clean model spared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def script() -> ModuleType:
    place = Path(__file__).parents[3] / "benchmarks" / "probe_faults.py"
    spec = importlib.util.spec_from_file_location("probe_faults", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["probe_faults"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


FAULTS = script()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", FAULTS.CASES, ids=lambda case: f"{case.probe}-{case.data}-{case.reference is not None}"
)
def test_a_planted_fault_is_caught_and_a_clean_model_spared(case: Any) -> None:
    assert FAULTS.scripted(case, case.clean, 0).alarms == {}
    for fault, (metrics, make) in case.faults.items():
        assert FAULTS.scripted(case, make, 0).alarms.keys() & set(metrics), fault


def test_every_probe_has_a_planted_fault() -> None:
    assert {case.probe for case in FAULTS.CASES} >= {
        "verbosity", "sycophancy", "style", "refusal", "hhh", "diversity", "tax",
    }  # fmt: skip
