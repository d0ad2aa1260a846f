"""Figures of stored tables: numbers in, a matplotlib figure out, and that as SVG for a page or as an image.

No function here computes a result; each draws the numbers that a stage has written. Figures have no global state
(`pyplot` is not imported) and no title: the page or the tag has it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from rlhf_lightning.ops.statistics import Interval

COLORS = ("#0072b2", "#d55e00", "#007f5c", "#a8488a", "#8a6d00", "#5c6670", "#3b4cc0", "#b40426")
"""Dark enough for white paper, told apart by people who are colour-blind (after Okabe and Ito 2008); a page may have
its own in the variables --c0, --c1, ... for a dark background."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, GRID = "#010203", "#d0d4d9"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_lightning",
    "text.color": INK,
    "text.parse_math": False,  # a name or an n-gram with a dollar sign is no formula
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 5.0
"""Inches of 72 units: at 390 pixels a page shows the text of a figure at about the size that is set here."""


@dataclass(frozen=True)
class Series:
    """One line or set of points: x and y, the ends of their intervals, and what the legend calls it.

    `look` is the number of its colour and marker, so that a model looks the same in every figure.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    x_low: Sequence[float] = ()
    x_high: Sequence[float] = ()
    look: int = 0
    dashed: bool = False
    points: bool = True
    line: bool = True


@contextmanager
def styled() -> Iterator[None]:
    """Draw with `STYLE`; a letter that the font of the machine lacks is drawn by the browser."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def short(name: str, most: int = 36) -> str:
    """Return a name as a label: on one line, with at most so many characters, so that room is left for the plot."""
    text = " ".join(name[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def lines(
    series: Sequence[Series], x_label: str, y_label: str, *, diagonal: bool = False, legend: bool = True
) -> Figure:
    """Return lines or points with their 95% intervals.

    Args:
        diagonal: also draw y = x, as of a reliability diagram.
        legend: name the series above the plot; a single one needs none.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 3.3))
        axis = figure.add_subplot()
        axis.grid(True)
        axis.set(xlabel=x_label, ylabel=y_label)
        if diagonal:
            axis.plot([0, 1], [0, 1], color=GRID, linewidth=1.5, zorder=1)
        for one in series:
            draw(axis, one)
        if legend and len(series) > 1:
            named(figure, [axis])
    return figure


def draw(axis: Any, one: Series) -> None:
    """Draw one series: its line, its points and its intervals."""
    color, marker = COLORS[one.look % len(COLORS)], MARKERS[one.look % len(MARKERS)]
    axis.plot(
        one.x, one.y, color=color, linewidth=1.5, label=short(one.name, 24), zorder=3,
        linestyle=("--" if one.dashed else "-") if one.line else "none",
        marker=marker if one.points else "none", markersize=5,
        markerfacecolor="none" if one.dashed else color,
    )  # fmt: skip
    if one.low and one.points:
        errors = spread(one.y, one.low, one.high)
        across = spread(one.x, one.x_low, one.x_high) if one.x_low else None
        axis.errorbar(
            one.x, one.y, yerr=errors, xerr=across, fmt="none", ecolor=color, elinewidth=1, capsize=2, zorder=2
        )
    elif one.low:
        axis.fill_between(one.x, one.low, one.high, color=color, alpha=0.18, linewidth=0)


def spread(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Return the distances (2, N) from values to the ends of their intervals; 0 where there is no interval."""
    ends = np.array([np.subtract(values, low), np.subtract(high, values)])
    return np.maximum(np.nan_to_num(ends, nan=0.0), 0.0)


def named(figure: Any, axes: Iterable[Any]) -> None:
    """Put one legend above the plots, in as many columns as fit."""
    of = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(of), 64 // (max(map(len, of)) + 6)))
    figure.legend(list(of.values()), list(of), loc="outside upper left", ncols=columns, fontsize=8.5)


def forest(
    rows: Sequence[tuple[str, Interval]], x_label: str, *, looks: Sequence[int] = (), zero: float | None = None
) -> Figure:
    """Return one value per row, from top to bottom, with its 95% interval.

    Args:
        looks: the number of each row's colour and marker.
        zero: where a vertical line says "no effect".
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(rows)))
        axis = figure.add_subplot()
        axis.grid(True, axis="x")
        figure.supxlabel(x_label, fontsize=mpl.rcParams["axes.labelsize"])  # long names leave the axis less room
        if zero is not None:
            axis.axvline(zero, color=INK, linewidth=0.8)
        for place, (_, (value, low, high)) in enumerate(rows):
            look = looks[place] if looks else 0
            color, marker = COLORS[look % len(COLORS)], MARKERS[look % len(MARKERS)]
            axis.errorbar(
                [value],
                [place],
                xerr=spread([value], [low], [high]),
                fmt=marker,
                color=color,
                capsize=3,
                markersize=5.5,
            )
        axis.set_yticks(range(len(rows)), [short(name) for name, _ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure


def cumulative(values: Mapping[str, Sequence[float]], x_label: str, looks: Mapping[str, int]) -> Figure:
    """Return for each name the share of its values that are at most x."""
    series = []
    for name, column in values.items():
        ordered = sorted(column)
        x = [ordered[0], *ordered]
        y = [place / len(ordered) for place in range(len(ordered) + 1)]
        series.append(Series(name, x, y, look=looks.get(name, 0), points=False))
    return lines(series, x_label, "share of the responses")


@dataclass(frozen=True)
class Panel:
    """One small plot of :func:`panels`: its y label and the lines in it."""

    label: str
    series: Sequence[Series] = field(default_factory=list)


def panels(of: Sequence[Panel], x_label: str) -> Figure:
    """Return small plots under each other with one x axis, such as the training curves of a run."""
    with styled():
        figure = Figure(figsize=(WIDTH, 0.5 + 1.25 * len(of)))
        axes = figure.subplots(len(of), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, of, strict=True):
            axis.grid(True)
            axis.set_ylabel(panel.label, fontsize=8.5)
            for one in panel.series:
                draw(axis, one)
        figure.align_ylabels(axes)
        if len({tuple(one.name for one in panel.series) for panel in of}) == 1 < len(of[0].series):
            named(figure, axes)
        else:
            for axis, panel in zip(axes, of, strict=True):
                if len(panel.series) > 1:
                    axis.legend(fontsize=7.5)
        axes[-1].set_xlabel(x_label)
    return figure


def as_svg(figure: Any, label: str) -> str:
    """Return a figure as an `<svg>` element for a page, in the colours of that page.

    Ink becomes `currentColor`, the grid `var(--grid)`, the n-th colour `var(--c<n>)`; where a page defines none, the
    colours are those that were drawn. Texts stay text. The same figure gives the same SVG.

    Args:
        label: what a screen reader says.
    """
    written = io.StringIO()
    with styled():
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=empty)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)  # else not one of a kind
    svg = recolored(svg)
    head = re.match(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", svg)
    assert head is not None
    spoken = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    start = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{head[1]}" '
    return f'{start}role="img" aria-label="{spoken}">{svg[head.end() :]}'


def recolored(svg: str) -> str:
    """Return an SVG whose colours, in attributes `style`, are those of the page that it is on."""
    named_colors = {INK: "currentColor", GRID: f"var(--grid, {GRID})"}
    named_colors |= {color: f"var(--c{number}, {color})" for number, color in enumerate(COLORS)}
    pattern = re.compile("|".join(map(re.escape, named_colors)))

    def styled_attribute(match: re.Match[str]) -> str:
        return pattern.sub(lambda color: named_colors[color[0]], match[0])

    return re.sub(r'style="[^"]*"', styled_attribute, svg)


def as_image(figure: Any, dpi: int = 140) -> np.ndarray:
    """Return a figure on white as pixels (height, width, 3), uint8."""
    written = io.BytesIO()
    with styled():
        figure.savefig(written, format="rgba", dpi=dpi, facecolor="white")
    width, height = (math.floor(inches * dpi) for inches in figure.get_size_inches())
    return np.frombuffer(written.getvalue(), np.uint8).reshape(height, width, 4)[..., :3]
