"""Figures show the numbers they are given, in the colours of the page, and nothing of a name is markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rlhf_lightning.evaluation.plots import COLORS, GRID, INK, Panel, Series, as_image, as_svg, forest, lines, panels

HOSTILE = '<script>alert(1)</script>$\\frac{" onload="x\u4f60\U0001f600'
ROWS = [("a", (0.5, 0.4, 0.6)), (HOSTILE, (0.7, float("nan"), float("nan")))]


@pytest.mark.slow
def test_a_name_is_text_whatever_is_in_it() -> None:
    svg = as_svg(forest(ROWS, HOSTILE), HOSTILE)
    root = ET.fromstring(svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath", "rect"}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    assert root.attrib["aria-label"] == HOSTILE
    assert [element.text for element in root.iter() if element.text == HOSTILE]


@pytest.mark.slow
def test_the_colours_are_those_of_the_page() -> None:
    svg = as_svg(lines([Series("a", [0, 1], [0, 1], look=1)], "x", "y"), "figure")
    assert "currentColor" in svg
    assert f"var(--c1, {COLORS[1]})" in svg
    assert f"var(--grid, {GRID})" in svg
    assert not re.search(rf"(?<!, ){INK}|(?<!, ){COLORS[1]}|(?<!, ){GRID}", svg)
    used = re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg)
    assert set(re.findall(r' id="([^"]*)"', svg)) == set(used)


@pytest.mark.slow
def test_an_interval_is_drawn_from_its_lower_to_its_upper_end() -> None:
    figure = forest([("a", (0.5, 0.3, 0.9))], "x")
    (bar,) = figure.axes[0].containers
    (segment,) = bar.lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.3, 0.9])
    figure = lines([Series("a", [1.0], [2.0], [1.5], [2.75], [0.5], [1.25])], "x", "y")
    across, up = (line.get_segments()[0] for line in figure.axes[0].containers[0].lines[2])
    np.testing.assert_allclose(across[:, 0], [0.5, 1.25])
    np.testing.assert_allclose(up[:, 1], [1.5, 2.75])


@pytest.mark.slow
def test_the_same_figure_is_an_image() -> None:
    image = as_image(panels([Panel("y", [Series("a", [0, 1], [0, 1])])], "step"), dpi=50)
    assert image.dtype == np.uint8
    assert image.shape == (87, 250, 3)
    assert (image.min(), image.max()) < (200, 256)
    assert image[0, 0].tolist() == [255, 255, 255]
