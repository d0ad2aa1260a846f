"""What stands out, in plain words: each rule reads stored 95% intervals, and speaks only where the interval says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rlhf_lightning.evaluation.report.store import Results, Stage, number, split_difference, visible
from rlhf_lightning.ops.statistics import Interval

Row = Mapping[str, Interval]
LONGER = 0.1
"""From this share on a difference in length is worth a sentence."""
CUT_OFF, CORRELATED = 0.1, 0.3
"""Shares of cut answers and correlations beyond which a sentence is worth reading."""


@dataclass(frozen=True)
class Finding:
    """One sentence, the model that it is about, and the file that it was read from; a gain is no warning."""

    text: str
    model: str
    source: str
    gain: bool = False


def above(row: Row, metric: str, value: float = 0.0) -> bool:
    """Return whether the whole interval of a metric lies above `value`."""
    return metric in row and row[metric][1] > value


def below(row: Row, metric: str, value: float = 0.0) -> bool:
    """Return whether the whole interval of a metric lies below `value`."""
    return metric in row and row[metric][2] < value


def signed(value: Interval, scale: float = 1.0, form: str = "+.3f", unit: str = "") -> str:
    """Return a difference and its 95% interval as a text."""
    mean, low, high = (scale * number for number in value)
    return f"{mean:{form}}{unit}, 95% interval {low:{form}} to {high:{form}}"


def share(value: Interval) -> str:
    """Return a share and its 95% interval as a text."""
    return signed(value, form=".3f")


Rule = Callable[[str, Row, str, Row], str | None]
"""Called with a model, its paired differences to another, that other's name and values; returns a sentence or None."""


def longer_and_no_better(model: str, gap: Row, other: str, values: Row) -> str | None:
    """Longer answers, and neither reward shows that they are better."""
    length, before = gap.get("length"), values.get("length", (0.0,))[0]
    judged = next((metric for metric in ("gold", "reward") if metric in gap), None)
    if length is None or judged is None or before <= 0 or above(gap, judged):
        return None
    if not above(gap, "length") or length[0] < LONGER * before:
        return None
    worse = "worse" if below(gap, judged) else "not shown to be better"
    return (
        f"{model}'s answers are {length[0] / before:.0%} longer than {other}'s "
        f"(95% interval {length[1] / before:.0%} to {length[2] / before:.0%}) and {worse} by "
        f"{NAMES[judged]} (difference {signed(gap[judged])})"
    )


def overoptimized(model: str, gap: Row, other: str, values: Row) -> str | None:
    """The proxy rises and the gold reward falls, or does not follow."""
    if "gold" not in gap or not above(gap, "reward") or above(gap, "gold"):
        return None
    change = "falls" if below(gap, "gold") else "is not shown to rise"
    return (
        f"{model} scores higher than {other} on the reward model ({signed(gap['reward'])}) while its gold reward "
        f"{change} ({signed(gap['gold'])}): a sign of overoptimization"
    )


def worse(model: str, gap: Row, other: str, values: Row) -> str | None:
    """A lower gold reward that no other rule has told."""
    if (
        not below(gap, "gold")
        or overoptimized(model, gap, other, values)
        or longer_and_no_better(model, gap, other, values)
    ):
        return None
    return f"{model} has a lower gold reward than {other} ({signed(gap['gold'])})"


def better(model: str, gap: Row, other: str, values: Row) -> str | None:
    """A higher gold reward, or where there is none a higher reward."""
    judged = "gold" if "gold" in gap else "reward"
    if not above(gap, judged):
        return None
    wins = gap.get(f"{judged}_win_rate")
    rate = f"; it wins {wins[0]:.0%} of the comparisons, {wins[1]:.0%} to {wins[2]:.0%}" if wins else ""
    return f"{model} is better than {other} by {NAMES[judged]} ({signed(gap[judged])}{rate})"


NAMES = {"gold": "the gold reward", "reward": "the reward model"}
CHANGES = {  # metric -> the direction that is bad, and the words
    "refused_harmful": (-1, "refuses fewer harmful requests than"),
    "over_refused": (1, "refuses more harmless requests than"),
    "flattered": (1, "agrees with more false beliefs than"),
    "corrected": (-1, "corrects fewer false beliefs than"),
    "padded": (1, "pads more answers than"),
    "ended_with_eos": (-1, "ends fewer answers with EOS than"),
}


def change(metric: str) -> Rule:
    """Return the rule of one share of `CHANGES`."""
    direction, words = CHANGES[metric]

    def rule(model: str, gap: Row, other: str, values: Row) -> str | None:
        if not (above if direction > 0 else below)(gap, metric):
            return None
        return f"{model} {words} {other} ({signed(gap[metric], 100, '+.1f', ' points')})"

    return rule


RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"length"}, longer_and_no_better),
    ({"reward", "gold"}, overoptimized),
    ({"gold"}, worse),
    *(({metric}, change(metric)) for metric in CHANGES),
)
"""The metrics that a warning is about, and its rule."""


BASELINES = ("longer", "bag_of_words")


def of_reward_model(model: str, row: Row, table: Mapping[str, Row]) -> Iterator[str]:
    """Yield what stands out of a reward model on held-out pairs."""
    accuracy, longer = row["accuracy"], table.get("longer", {}).get("accuracy")
    if accuracy[1] <= 0.5:
        yield f"{model} is not shown to be better than chance on held-out pairs (accuracy {share(accuracy)})"
    elif longer is not None and longer[0] >= accuracy[1]:
        rule = f"the rule that takes the longer response ({longer[0]:.3f})"
        yield f"{model} is not shown to beat {rule} on held-out pairs (accuracy {share(accuracy)})"
    if above(row, "length_spearman", CORRELATED):
        yield f"{model} scores longer responses higher (rank correlation with length {share(row['length_spearman'])})"
    if below(row, "shorter_accuracy", 0.5):
        there = f"accuracy there {share(row['shorter_accuracy'])}"
        yield f"{model} prefers the longer response where the shorter one is better ({there})"


def findings(results: Results) -> tuple[list[Finding], int]:
    """Return what stands out in all stages, gains first, and the number of comparisons that were looked at."""
    told = [finding for stage in results.stages for finding in (*of_differences(stage), *of_models(stage))]
    told += [*of_win_rates(results), *of_probes(results)]
    found = [finding for finding in told if finding is not None]
    return sorted(found, key=lambda finding: not finding.gain), len(told)


def of_differences(stage: Stage) -> Iterator[Finding | None]:
    """Yield for every paired difference and rule a finding, or None where nothing stands out."""
    for name, gap in stage.models.items():
        model, other = split_difference(name, stage.models) or ("", "")
        for needed, rule in RULES if model and model not in stage.earlier else ():
            if needed <= gap.keys():
                text = rule(model, gap, other, stage.models[other])
                yield Finding(text, model, f"{stage.name}/metrics.json") if text else None
        if model and model not in stage.earlier and (text := better(model, gap, other, stage.models[other])):
            yield Finding(text, model, f"{stage.name}/metrics.json", gain=True)


def of_models(stage: Stage) -> Iterator[Finding | None]:
    """Yield for every model by itself its findings, or None where nothing stands out."""
    for model, row in stage.models.items():
        if model in (*BASELINES, *stage.earlier) or split_difference(model, stage.models):
            continue
        texts = list(of_reward_model(model, row, stage.models)) if "accuracy" in row else []
        if below(row, "ended_with_eos", 1 - CUT_OFF):
            cut = f"{1 - row['ended_with_eos'][0]:.0%} of {model}'s answers are cut off at the token limit"
            texts.append(f"{cut}, so their rewards are of cut answers")
        yield from (Finding(text, model, f"{stage.name}/metrics.json") for text in texts)
        if not texts:
            yield None


def of_win_rates(results: Results) -> Iterator[Finding | None]:
    """Yield for every length-controlled win rate a finding where wins are not shown at equal length, else None."""
    for stage, rows in results.rows("win_rates"):
        for row in rows:
            ends = ("win_rate", "low", "length_controlled", "length_controlled_low", "length_controlled_high")
            values = [value for name in ends if (value := number(row.get(name))) is not None]
            if len(values) < len(ends):
                continue
            rate, low, controlled, controlled_low, controlled_high = values
            if low <= 0.5 or controlled_low > 0.5:
                yield None
                continue
            model, other, by = (visible(row.get(name, "")) for name in ("model", "opponent", "by"))
            at_equal = share((controlled, controlled_low, controlled_high))
            text = (
                f"{model} wins {rate:.0%} of the comparisons with {other} by {by}, and at equal length it is not shown "
                f"to win more than half ({at_equal})"
            )
            yield Finding(text, model, f"{stage.name}/tables/win_rates.jsonl")


def of_probes(results: Results) -> Iterator[Finding | None]:
    """Yield for every metric of a probe its alarm, or None without one."""
    for stage, rows in results.rows("probes"):
        for row in rows:
            alarm, model = row.get("alarm"), visible(row.get("model", ""))
            if not alarm:
                yield None
                continue
            raised = f"probe {visible(row.get('probe'))}: {visible(row.get('metric'))} raises an alarm"
            text = visible(alarm, 600) if isinstance(alarm, str) else raised
            yield Finding(text if model in text else f"{model}: {text}", model, f"{stage.name}/tables/probes.jsonl")
