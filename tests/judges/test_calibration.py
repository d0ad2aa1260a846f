"""Temperature scaling of a judge's probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from rlhf_lightning.judges.calibration import calibrated, calibration_error, cross_fitted, fit_temperature


def overconfident(temperature: float, n: int = 4000) -> tuple[list[float], list[float]]:
    """Return what a judge says whose log-odds are `temperature` times too large, and the labels."""
    rng = np.random.default_rng(0)
    odds = rng.normal(size=n)
    labels = (rng.random(n) < expit(odds)).astype(float)
    return expit(temperature * odds).tolist(), labels.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_an_overconfident_judge_is_found(temperature: float) -> None:
    probabilities, labels = overconfident(temperature)
    assert fit_temperature(probabilities, labels) == pytest.approx(temperature, rel=0.1)  # its standard error is 4%


def test_sides_may_be_named_either_way() -> None:
    probabilities, labels = overconfident(2.0, 500)
    other = fit_temperature([1 - p for p in probabilities], [1 - y for y in labels])
    assert other == pytest.approx(fit_temperature(probabilities, labels), rel=1e-4)


def test_a_judge_that_knows_nothing_has_no_confidence() -> None:
    assert fit_temperature([0.9, 0.9, 0.1], [0, 1, 1]) == math.inf
    assert calibrated(0.9, math.inf) == 0.5


def test_verdicts_without_doubt_get_that_of_their_accuracy() -> None:
    """A judge that writes A or B and is right in 3 of 4 pairs is believed at 0.75."""
    probabilities, labels = [1.0, 1.0, 0.0, 0.0] * 50, [1.0, 0.0, 0.0, 0.0] * 50
    temperature = fit_temperature(probabilities, labels)
    assert calibrated(1.0, temperature) == pytest.approx(0.75, abs=1e-3)
    assert calibrated(0.0, temperature) == pytest.approx(0.25, abs=1e-3)


def test_shares_of_annotators_are_labels() -> None:
    temperature = fit_temperature([0.99] * 10, [2 / 3] * 10)
    assert calibrated(0.99, temperature) == pytest.approx(2 / 3, abs=1e-3)


def test_calibration_error() -> None:
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0.0)
    assert calibration_error([0.25] * 4, [0, 0, 0, 1]) == pytest.approx(0.0)
    assert calibration_error([1.0] * 4, [1, 1, 0, 0]) == pytest.approx(0.5)
    assert calibration_error([0.5] * 4, [1, 1, 1, 1]) == pytest.approx(0.0)  # a tie claims nothing


def test_calibration_is_measured_on_other_prompts() -> None:
    probabilities, labels = overconfident(3.0)
    clusters = [i // 2 for i in range(len(labels))]
    found = cross_fitted(probabilities, labels, clusters)
    assert calibration_error(found, labels) < 0.5 * calibration_error(probabilities, labels)
    sure, fair = overconfident(3.0), overconfident(1.0)
    probabilities, labels = (
        [v for two in zip(*halves, strict=True) for v in two] for halves in zip(sure, fair, strict=True)
    )
    found = cross_fitted(probabilities, labels, list(range(len(labels))))
    slopes = [logit(found[i]) / logit(probabilities[i]) for i in range(200)]
    assert np.median(slopes[::2]) == pytest.approx(1.0, rel=0.1)  # of the fair half
    assert np.median(slopes[1::2]) == pytest.approx(1 / 3, rel=0.1)
    assert cross_fitted([0.9], [1.0], ["one"]) == [0.9]
