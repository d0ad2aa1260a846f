"""The labeling page under hands that are quick, clumsy or interrupted: keys, clicks, reloads, a slow network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import Tabs, events, press, progressed, saved
from tests.helpers.labeling import items_of, labeling_of, rows

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


def test_a_key_held_down_is_one_label(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(3), ("anna",))
    page = tabs.open(serve(labeling).links["anna"])
    page.evaluate(
        "for (let i = 0; i < 5; i++) document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', repeat: i > 2}))"
    )
    saved(page, labeling, 1)
    page.wait_for_timeout(100)
    assert events(labeling, "value") == [("label", -3)]


def test_enter_saves_after_a_button_was_used(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    """A button that was clicked, or left by Tab for the scale, does not take Enter from what is marked."""
    labeling = labeling_of(tmp_path, rows(2), ("anna",))
    page = tabs.open(serve(labeling).links["anna"])
    page.click("text=Help")
    press(page, "Escape", "ArrowRight", "Enter")
    saved(page, labeling, 1)
    press(page, "Tab", "Tab", "ArrowLeft", "Enter")
    saved(page, labeling, 2)
    assert events(labeling, "value") == [("label", 1), ("label", -1)]


def test_a_double_click_on_a_slow_network_is_one_label(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(3), ("anna",))
    page = tabs.open(serve(labeling).links["anna"])
    sent: list[Any] = []
    page.route("**/label", lambda route: sent.append(route))  # on its way until it is let through
    page.dblclick(".point >> nth=0")
    press(page, "l", "u")
    page.wait_for_timeout(100)
    sent[0].continue_()
    progressed(page, "1 of 3")
    assert len(sent) == 1
    page.go_back()
    page.go_forward()
    progressed(page, "1 of 3")
    assert events(labeling, "value") == [("label", -3)]


def test_a_long_prompt_says_that_it_goes_on(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    given = [{"prompt": "A sentence of a long prompt. " * 300, "responses": ["a", "b"]}]
    page = tabs.open(serve(labeling_of(tmp_path, given, ("anna",))).links["anna"], width=390)
    page.wait_for_selector(".turn.long .more >> text=Show all")
    before = page.locator(".turn .text").bounding_box()["height"]
    press(page, "e")
    assert page.locator(".turn .text").bounding_box()["height"] > 2 * before
    assert page.locator(".card .more:visible").count() == 0  # of short answers there is no more


@pytest.mark.parametrize("mode", ["write", "chat"])
def test_a_draft_is_there_after_a_reload(tabs: Tabs, serve: Any, tmp_path: Path, mode: str) -> None:
    labeling = labeling_of(tmp_path, items_of(rows(2), mode) if mode == "write" else {}, ("anna",), mode)
    page = tabs.open(serve(labeling).links["anna"], wait="textarea")
    page.keyboard.type("Half an ans")
    page.reload()
    page.wait_for_selector("textarea")
    assert page.input_value("textarea") == "Half an ans"
    press(page, "Control+Enter" if mode == "write" else "Enter")
    saved(page, labeling, 1)
    assert page.evaluate("sessionStorage.length") == 0


def test_a_ranking_button_keeps_the_focus(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, items_of(rows(1, 3), "rank"), ("anna",), "rank")
    page = tabs.open(serve(labeling).links["anna"])
    page.focus(".ranks li:nth-child(1) [aria-label='Move down']")
    press(page, "Enter", "Enter")
    assert "Answer A has rank 3" in page.inner_text(".bar")
    page.click("text=Save ranking")
    saved(page, labeling, 1)
    assert labeling.store.events[0].value["ranks"] == [2, 0, 1]
