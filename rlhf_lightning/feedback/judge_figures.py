"""How far a judge can be trusted: the figures of a file of its labels, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.comparisons import digest
from rlhf_lightning.data.layouts import Row
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.judges.calibration import calibrated, calibration_error, cross_fitted, fit_temperature
from rlhf_lightning.ops.statistics import Interval, share_interval

CALIBRATIONS = ("none", "temperature")
Rankings = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Pair:
    """Two responses of a judged comparison.

    Args:
        cluster: of the prompt.
        orders: the probability that the first is better, shown first and shown second.
        longer: 1 where the first is longer, -1 where the second.
        known: the share of the row's own labels for the first, ties half; None where it has none.
    """

    cluster: str
    orders: tuple[float, float]
    longer: int
    known: float | None

    @property
    def probability(self) -> float:
        """That the first is better."""
        return (self.orders[0] + self.orders[1]) / 2


def pairs_of(row: Row, known: Rankings) -> Iterator[tuple[tuple[int, int], Pair]]:
    """Yield (places, pair) of a row of a judge's labels; equal responses are no pair.

    Args:
        known: the rankings of the comparison that its rows had, in the order of its responses.
    """
    responses, cluster = [text.strip() for text in row["responses"]], digest(row["prompt"], ())
    for i, j, forward, swapped in row["judge"]["pairs"]:
        if responses[i] == responses[j] or forward is None or swapped is None:
            continue
        votes = [0.5 + ((ranking[j] > ranking[i]) - (ranking[j] < ranking[i])) / 2 for ranking in known]
        a, b = len(responses[i]), len(responses[j])
        yield (i, j), Pair(cluster, (forward, swapped), (a > b) - (a < b), sum(votes) / len(votes) if votes else None)


def figures(rows: Sequence[Row], known: Mapping[str, Rankings], ordered: bool = True) -> dict[str, Interval]:
    """Return name -> (value, ends of its 95% interval, by prompt) of a judge's labels.

    Args:
        rows: of labels, as stage=judge writes them.
        known: id -> the rankings that the judged rows had.
        ordered: the judge saw responses side by side, so that their order may matter.
    """
    pairs = [pair for row in rows for _, pair in pairs_of(row, known.get(row["id"], ()))]
    table: dict[str, Interval] = {}

    def add(name: str, values: Sequence[float], clusters: Sequence[str]) -> None:
        if values:
            table[name] = share_interval(values, clusters)  # too wide where there are ties, which count half

    labeled = [pair for pair in pairs if pair.known is not None and pair.known != 0.5]
    add("accuracy", [credit(p.probability, p.known) for p in labeled], [p.cluster for p in labeled])
    if ordered:
        single = [(credit(order, p.known), p.cluster) for p in labeled for order in p.orders]
        add("accuracy_single_order", [value for value, _ in single], [cluster for _, cluster in single])
        shown = [(order if k == 0 else 1 - order, p.cluster) for p in pairs for k, order in enumerate(p.orders)]
        shown = [(float(value > 0.5), cluster) for value, cluster in shown if value != 0.5]
        add("first_shown", [value for value, _ in shown], [cluster for _, cluster in shown])
        flips = [float(side(p.orders[0]) != side(p.orders[1])) for p in pairs]
        add("flips", flips, [p.cluster for p in pairs])
    add("ties", [float(p.probability == 0.5) for p in pairs], [p.cluster for p in pairs])
    uneven = [p for p in pairs if p.longer and p.probability != 0.5]
    add("longer", [float(side(p.probability) == p.longer) for p in uneven], [p.cluster for p in uneven])
    people = [p for p in labeled if p.longer and p.known is not None]
    add("longer_in_rows", [float(side(p.known) == p.longer) for p in people], [p.cluster for p in people])
    counted = [(row["judge"]["samples"], digest(row["prompt"], ())) for row in rows]
    sampled = [(alike / total, cluster) for (alike, total), cluster in counted if total]
    add("self_consistency", [value for value, _ in sampled], [cluster for _, cluster in sampled])
    return table


def credit(probability: float, known: float | None) -> float:
    """Return 1 where the judge prefers what most labels prefer, 0 where not, 0.5 for a tie."""
    return 0.5 if probability == 0.5 else float(side(probability) == side(known or 0.0))


def side(probability: float | None) -> int:
    """Return 1 for the first response, -1 for the second, 0 for neither."""
    value = 0.5 if probability is None else probability
    return (value > 0.5) - (value < 0.5)


def counts(details: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what was asked, what failed and what it cost, from `judge` of the rows of labels and of failures."""
    names = ("questions", "unreadable", "refusals", "errors", "prompt_tokens", "completion_tokens", "cached", "cost")
    total: dict[str, float] = {name: sum(one[name] for one in details) for name in names}
    masses = [one["mass"] for one in details if one["mass"] is not None]
    return total | ({"verdict_mass": sum(masses) / len(masses)} if masses else {})


def warnings(table: Mapping[str, Interval], counted: Mapping[str, float]) -> list[str]:
    """Return what a user should know before trusting the labels."""
    lines = []
    share, low, high = table.get("first_shown", (0.5, 0.0, 1.0))
    if abs(share - 0.5) > 0.15 and not low <= 0.5 <= high:
        place = "first" if share > 0.5 else "last"
        lines.append(
            f"position bias: the response shown {place} is preferred in {max(share, 1 - share):.0%} of verdicts; both "
            "orders are asked, so a verdict that changes with the order becomes a tie or a weak one"
        )
    if "flips" in table and table["flips"][0] > 0.5:
        lines.append(f"{table['flips'][0]:.0%} of the pairs get another verdict in the other order")
    if "accuracy" in table and table["accuracy"][1] <= 0.5:
        lines.append("the judge agrees with the labels of the rows no better than chance, or the interval is too wide")
    failed = sum(counted[name] for name in ("unreadable", "refusals", "errors"))
    if counted["questions"] and failed / counted["questions"] > 0.05:
        lines.append(f"{failed:g} of {counted['questions']:g} questions got no verdict; failures.jsonl says why")
    if counted.get("verdict_mass", 1.0) < 0.5:
        lines.append(
            f"verdicts have {counted['verdict_mass']:.1%} of the probability: the judge would write something else"
        )
    return lines


# ---- soft labels -----------------------------------------------------------------------------------------------------


def temperature_of(
    rows: Sequence[Row], known: Mapping[str, Rankings], calibrate: str
) -> tuple[float, dict[str, float]]:
    """Return the temperature of the soft labels, and the calibration error before and after, of other prompts.

    Raises:
        UserError: an unknown method, or no row has a label to calibrate on.
    """
    if calibrate not in CALIBRATIONS:
        raise UserError(
            f"judge.calibrate={calibrate} is not one of {', '.join(CALIBRATIONS)}.{nearest(calibrate, CALIBRATIONS)}"
        )
    pairs = [pair for row in rows for _, pair in pairs_of(row, known.get(row["id"], ()))]
    shares = [(p.probability, p.known, p.cluster) for p in pairs if p.known is not None]
    if not shares:
        if calibrate != "none":
            raise UserError(f"judge.calibrate={calibrate} needs rows with labels: chosen and rejected, or a ranking")
        return 1.0, {}
    probabilities, labels, clusters = (list(column) for column in zip(*shares, strict=True))
    measured = {"calibration_error": calibration_error(probabilities, labels)}
    if calibrate == "none":
        return 1.0, measured
    measured["calibration_error_after"] = calibration_error(cross_fitted(probabilities, labels, clusters), labels)
    temperature = fit_temperature(probabilities, labels)
    return temperature, measured | ({"temperature": temperature} if math.isfinite(temperature) else {})


def soft_rows(rows: Sequence[Row], temperature: float = 1.0) -> list[Row]:
    """Return a preference row for every two responses, whose `label` is the probability of the chosen one.

    Empty responses, and those that repeat another, are left out.
    """
    made = []
    for row in rows:
        left_out = ("responses", "ranking", "annotator", "seconds", "time", "judge", "probability", "ratings", "votes")
        shared = {name: value for name, value in row.items() if name not in left_out}
        bare = [text.strip() for text in row["responses"]]
        used = {i for i, text in enumerate(bare) if text and text not in bare[:i]}
        for (i, j), pair in pairs_of(row, ()):
            if not {i, j} <= used:
                continue
            texts = row["responses"][i], row["responses"][j]
            p = pair.probability if temperature == 1.0 else calibrated(pair.probability, temperature)
            chosen, rejected, label = (*texts, p) if p >= 0.5 else (*reversed(texts), 1 - p)
            made.append(shared | {"chosen": chosen, "rejected": rejected, "label": label})
    return made
