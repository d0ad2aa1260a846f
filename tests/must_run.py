"""Counts and times the tests of each marker, and fails a session in which a marker it must run had no passing test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

TIERS = ("slow", "dist", "oracle", "browser", "nightly")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", default="", help="markers, comma separated, of which a test must pass")


def tiers(config: pytest.Config) -> Iterator[tuple[str, int, float]]:
    """Yield marker, passed tests and their seconds; tests without a marker are the unit tier."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    passed, seconds = Counter[str](), Counter[str]()
    for report in (r for reports in reporter.stats.values() for r in reports if isinstance(r, pytest.TestReport)):
        for tier in [marker for marker in TIERS if marker in report.keywords] or ["unit"]:
            seconds[tier] += report.duration  # type: ignore[assignment]
            passed[tier] += report.when == "call" and report.passed
    yield from ((tier, passed[tier], seconds[tier]) for tier in ("unit", *TIERS))


def missing(config: pytest.Config) -> list[str]:
    """Return the markers that had to run and did not."""
    ran = {tier for tier, passed, _ in tiers(config) if passed}
    return [marker for marker in filter(None, config.getoption("--must-run").split(",")) if marker not in ran]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and missing(session.config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    line = ", ".join(f"{tier} {passed} passed in {seconds:.0f} s" for tier, passed, seconds in tiers(config))
    terminalreporter.write_line(f"tiers (seconds of all workers; a test may be in two): {line}")
    for marker in missing(config):
        terminalreporter.write_line(f"ERROR: no test marked {marker} passed, but --must-run asks for one", red=True)
