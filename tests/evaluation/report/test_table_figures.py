"""Every table of the store has its figure, with the numbers of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lightning.evaluation.report.tables import FIGURES, buckets, usable

pytestmark = pytest.mark.slow
ENDS = {"low": 0.4, "high": 0.7}
ROWS: dict[str, list[dict[str, Any]]] = {
    "overoptimization": [
        {"method": method, "proxy": "rm", "seed": 0, "setting": str(n), "kl": float(n), "kl_low": n, "kl_high": n,
         "proxy_reward": n / 2, "proxy_low": n / 2 - 0.1, "proxy_high": n / 2 + 0.1, "gold_reward": None if method == "dpo" else 1.0, **ENDS}
        for method in ("best_of_n", "ppo", "dpo") for n in (4, 0, 1)
    ],
    "frontier": [{"method": "ppo", "proxy": "rm", "kl": 1.0, "reward": 0.5, **ENDS}],
    "calibration": [{"model": "rm", "bin_low": 0.0, "bin_high": 0.5, "count": 9, "predicted": p, "observed": p + 0.1, **ENDS} for p in (0.7, 0.2)],
    "margins": [{"model": "rm", "bucket": "0 to 1", "count": 9, "accuracy": 0.5, **ENDS}],
    "lengths": [{"model": "rm", "bucket": "1", "count": 9, "accuracy": 0.5}],
    "sources": [{"model": "rm", "by": "best of n", "bucket": "math", "count": 9, "accuracy": 0.5, **ENDS}],
    "annotators": [{"model": "rm", "bucket": "anna", "count": 9, "accuracy": 0.5, **ENDS}],
    "ngrams": [{"model": "rm", "ngram": "as an AI", "count": 9, "effect": e, "low": e - 1, "high": e + 1} for e in (0.1, -2.0, 1.0)],
    "paraphrases": [{"model": "rm", "change": "bold", "shift": 0.2, "flipped": 0.1, **ENDS}],
    "win_rates": [
        {"model": "a", "opponent": "b", "by": "gold", "win_rate": 0.6, **ENDS, "length_controlled": 0.5, "length_controlled_low": 0.3, "length_controlled_high": 0.8},
        {"model": "a", "opponent": "c", "by": "world", "win_rate": 0.6, **ENDS, "length_controlled": None},
    ],
    "ratings": [{"model": name, "by": "gold", "rating": r, "low": r - 9, "high": r + 9} for name, r in (("a", -20.0), ("b", 20.0))],
    "probes": [{"probe": "style", "model": "a", "metric": "hedges", "value": 0.5, **ENDS, "count": 9, "alarm": None}],
    "kl_by_position": [{"model": "a", "position": p, "kl": 1 / (1 + p), "low": 0.0, "high": 2.0, "count": 9} for p in range(20)],
}  # fmt: skip


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: row.table)
def test_every_table_is_drawn(row: Any) -> None:
    complaints: list[str] = []
    rows = usable(ROWS[row.table], row, "source", complaints.append)
    assert len(rows) == len(ROWS[row.table])
    assert complaints == []
    plots = dict(row.draw(rows, {"a": 0, "rm": 1}))
    assert plots
    if row.table == "overoptimization":
        assert list(plots) == ["best_of_n", "ppo", "dpo"]
        above, below = plots["ppo"].axes
        np.testing.assert_allclose(above.lines[0].get_xydata(), [[0, 0], [1, 0.5], [2, 2]])  # the square root of KL
        assert below.lines[0].get_ydata().tolist() == [1.0, 1.0, 1.0]
        assert len(plots["dpo"].axes) == 1  # there is no gold reward of it
    if row.table == "ngrams":
        assert [label.get_text() for label in plots["rm"].axes[0].get_yticklabels()] == ["as an AI"] * 3
        marks = [line.get_xdata()[0] for line in plots["rm"].axes[0].lines if line.get_marker() == "s"]
        assert marks == [-2.0, 1.0, 0.1]  # the largest first
    if row.table == "win_rates":
        assert list(plots) == ["by gold", "by world"]
        names = [label.get_text() for label in plots["by gold"].axes[0].get_yticklabels()]
        assert names == ["a over b", "a over b, length-controlled"]
        (segment,) = plots["by gold"].axes[0].containers[1].lines[2][0].get_segments()
        np.testing.assert_allclose(segment[:, 0], [0.3, 0.8])
    if row.table == "calibration":
        diagonal, curve = plots[""].axes[0].lines[:2]
        np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
        np.testing.assert_allclose(curve.get_xydata(), [[0.2, 0.3], [0.7, 0.8]])


def test_every_figure_has_rows_here() -> None:
    assert {row.table for row in FIGURES} == set(ROWS)


def test_a_long_bucket_keeps_its_number_of_pairs() -> None:
    row = {"model": "reward", "by": "annotator", "bucket": "annotator_" * 9, "count": 210, "accuracy": 0.7}
    ((_, figure),) = buckets([row | {"low": 0.6, "high": 0.8}], {})
    (label,) = figure.axes[0].get_yticklabels()
    assert label.get_text().endswith("… (210)")
    assert figure.get_supxlabel() == "pair accuracy; the number of pairs in brackets"
