"""A headless Chromium as tests of the labeling page use it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from rlhf_lightning.feedback.labeling.service import Labeling


class Tabs:
    """Opens pages; afterwards no page has raised an error or asked for anything that is not on loopback."""

    def __init__(self, browser: Any) -> None:
        self.browser, self.requests, self.errors = browser, list[str](), list[str]()
        self.contexts: list[Any] = []

    def open(self, link: str, width: int = 1280, context: Any = None, wait: str = "main > section") -> Any:
        if context is None:
            context = self.browser.new_context(viewport={"width": width, "height": 844}, has_touch=width < 500)
            self.contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._answer)
        page.set_default_timeout(20_000)
        page.goto(link)
        page.wait_for_selector(wait)
        return page

    def _answer(self, dialog: Any) -> None:
        if dialog.type != "beforeunload":  # the browser's own question before unsaved text is left
            self.errors.append(dialog.message)
        dialog.accept()

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        hosts = {urlsplit(url).hostname for url in self.requests}
        assert hosts <= {"127.0.0.1"}
        assert self.errors == []


def press(page: Any, *keys: str) -> None:
    for name in keys:
        page.keyboard.press(name)


def saved(page: Any, labeling: Labeling, count: int) -> None:
    """Wait until the page shows that the store has so many events."""
    deadline = time.monotonic() + 20
    while len(labeling.store.events) < count or "busy" in (page.get_attribute("body", "class") or ""):
        assert time.monotonic() < deadline, labeling.store.events
        page.wait_for_timeout(10)


def progressed(page: Any, text: str) -> None:
    """Wait for a text beside the progress bar; the page's policy forbids to wait for an expression."""
    page.wait_for_selector(f".progress span:text-is('{text}')")


def events(labeling: Labeling, *names: str) -> list[tuple[Any, ...]]:
    return [(event.kind, *(event.value.get(name) for name in names)) for event in labeling.store.events]
