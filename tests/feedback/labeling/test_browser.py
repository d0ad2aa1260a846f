"""The labeling page in headless Chromium: keys, widths, modes, hostile texts, and a server that is killed."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.template import Template
from rlhf_lightning.feedback.labeling.items import Item
from rlhf_lightning.feedback.labeling.service import Labeling, PageSettings
from rlhf_lightning.feedback.labeling.store import Store
from rlhf_lightning.generation.chat import LocalChat
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from tests.helpers.browser import Tabs, press, progressed, saved
from tests.helpers.cli import environment, fork_server
from tests.helpers.labeling import items_of, labeling_of, rows

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]
HOSTILE = (
    "<script>window.hacked = 1</script><img src=http://example.com/x.png onerror='window.hacked = 1'>"
    "<a href='javascript:window.hacked = 1'>x</a><iframe src=http://example.com></iframe><style>* {display: none}</style>"
    "\n\n```\n</code></pre><script>window.hacked = 1</script>\n```\n\n[x](javascript:window.hacked=1) ![x](http://example.com/y.png)"
)


def test_two_annotators_by_keys_alone(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(
        tmp_path,
        rows(6),
        overlap=1.0,
        page={"groups": ["students", "teachers"], "instructions": "# Be kind\n\n* **always**"},
    )
    server = serve(labeling)
    pages = {name: tabs.open(link) for name, link in server.links.items()}
    for name, group in (("anna", "2"), ("ben", "0")):
        press(pages[name], group)
        pages[name].wait_for_selector("dialog li strong")  # the instructions
        press(pages[name], "Escape")
    for turn, name in ((turn, name) for turn in range(6) for name in ("anna", "ben")):
        count = len(labeling.store.events)
        press(pages[name], *(["asdfjkl"[turn]] if name == "anna" else ["ArrowRight", "ArrowRight", "Enter"]))
        saved(pages[name], labeling, count + 1)
    assert all(page.inner_text("h2") == "All done" for page in pages.values())
    given = {
        name: [e.value["value"] for e in labeling.store.events if e.kind == "label" and e.annotator == name]
        for name in pages
    }
    assert given == {"anna": [-3, -2, -1, 0, 1, 2], "ben": [2] * 6}
    assert [labeling.history.annotators[name].group for name in pages] == ["teachers", None]
    overview = tabs.open(server.overview)
    assert "12" in overview.inner_text(".facts")
    assert "anna" in overview.inner_text("table")


def test_undo_skip_flag_help_and_warning(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, [rows(1)[0] | {"content_warning": "insults"}], ("anna",), page={"scale": 7})
    page = tabs.open(serve(labeling).links["anna"])
    assert "insults" in page.inner_text("main")
    assert "answer" not in page.inner_text("main")
    press(page, "7")  # there is nothing to label yet
    press(page, "w")
    page.wait_for_selector(".card")
    press(page, "?")
    assert "A is much better" in page.inner_text("dialog")
    press(page, "Escape", "g", "2")
    saved(page, labeling, 1)
    press(page, "x")
    page.keyboard.type("3")
    saved(page, labeling, 2)
    press(page, "u")
    saved(page, labeling, 3)
    press(page, "w", "2")
    saved(page, labeling, 4)
    press(page, "u")
    saved(page, labeling, 5)
    page.wait_for_selector(".warning")
    press(page, "w")
    page.wait_for_selector('.point[aria-pressed="true"] >> text=2')  # what was given before
    press(page, "Enter")
    saved(page, labeling, 6)
    assert [event.kind for event in labeling.store.events] == ["flag", "skip", "undo", "label", "undo", "label"]
    assert labeling.store.events[0].value["reason"] == "Broken or cut off text"
    assert labeling.store.events[1].value["reason"] == "The prompt is unclear"
    assert labeling.store.events[-1].value["value"] == -2


def test_a_link_in_two_tabs(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(2), ("anna",))
    link = serve(labeling).links["anna"]
    first = tabs.open(link)
    assert "#" not in first.url  # the token does not stay in the address
    tabs.open(link, context=first.context)
    press(first, "a")
    first.wait_for_selector("text=This link was opened in another tab or browser")
    assert labeling.store.events == []
    press(first, "Enter")  # use this tab
    first.wait_for_selector(".card")
    press(first, "a")
    saved(first, labeling, 1)
    first.reload()
    first.wait_for_selector(".card")
    assert first.inner_text(".progress") == "1 of 2"


def test_hostile_texts_stay_texts(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    row = {"id": HOSTILE, "prompt": HOSTILE, "responses": [HOSTILE, HOSTILE + "!"], "content_warning": HOSTILE}
    labeling = labeling_of(tmp_path, [row], ("anna",), page={"instructions": HOSTILE, "groups": [HOSTILE]})
    server = serve(labeling)
    page = tabs.open(server.links["anna"])
    press(page, "1")
    page.wait_for_selector("dialog")
    press(page, "Escape", "w")
    page.wait_for_selector(".card")
    press(page, "i")
    assert page.locator("script, img, iframe, a, style:not(head *), svg").count() == 1  # the page's own script
    assert page.inner_text(".card .text").count("<script>") == 2
    press(page, "Escape", "g")
    page.fill("dialog input", HOSTILE)
    press(page, "Enter")
    saved(page, labeling, 2)
    overview = tabs.open(server.overview)
    for opened in (page, overview):
        assert opened.evaluate("window.hacked") is None
        assert opened.locator("iframe, img, a").count() == 0
    assert HOSTILE.splitlines()[0] in overview.inner_text("main")
    page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { window.stopped = error.name } }"
    )
    assert page.evaluate("window.stopped") == "TypeError"  # trusted types


def test_ranking_by_keys_and_by_dragging(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, items_of(rows(2, 4), "rank"), ("anna",), "rank")
    page = tabs.open(serve(labeling).links["anna"])
    press(page, "ArrowDown", "ArrowDown", "1")  # the third first: C A B D
    press(page, "ArrowDown", "ArrowDown", "t", "Enter")  # B ties with A
    saved(page, labeling, 1)
    assert labeling.store.events[0].value["ranks"] == [1, 1, 0, 2]
    page.wait_for_selector(".ranks li >> nth=3")
    handle, last = page.locator(".handle").nth(0).bounding_box(), page.locator(".ranks li").nth(3).bounding_box()
    page.mouse.move(handle["x"] + 5, handle["y"] + 5)
    page.mouse.down()
    page.mouse.move(handle["x"] + 5, last["y"] + last["height"] - 5, steps=8)
    page.mouse.up()
    press(page, "Shift+ArrowUp", "g", "4")
    saved(page, labeling, 2)
    press(page, "Enter")  # a flag leaves the order as it is
    saved(page, labeling, 3)
    assert labeling.store.events[2].value["ranks"] == [2, 0, 1, 3]


def test_editing_and_withdrawing(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    labeling = labeling_of(
        tmp_path,
        items_of([{"prompt": "p", "response": "سلام"}, {"prompt": "q", "response": "b"}], "edit"),
        ("anna",),
        "edit",
    )
    page = tabs.open(serve(labeling).links["anna"])
    page.keyboard.type(" x")
    press(page, "Control+Enter")
    saved(page, labeling, 1)
    assert labeling.store.events[0].value["text"] in ("سلام x", "b x")
    press(page, "Escape", "?")
    page.click("text=Withdraw all my labels")
    page.click("dialog .danger")
    page.wait_for_selector("text=Your labels are withdrawn")
    assert labeling.store.events[-1].kind == "withdraw"


def test_a_conversation_with_a_model(tabs: Tabs, serve: Any, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", ["Hello. How are you?"], vocab_size=270, hidden_size=16, layers=1, heads=2)
    chat = LocalChat(load_causal_lm(folder).eval(), Template(load_tokenizer(folder)), LocalEngine(), max_new_tokens=8)
    store = Store(tmp_path / "labels.db", {"mode": "chat", "seed": 0})
    labeling = Labeling(store, {}, ["anna"], PageSettings("chat"), chat=chat, num_generations=3)
    page = tabs.open(serve(labeling).links["anna"], wait="textarea")
    for turn in range(2):
        page.keyboard.type(f"Hello {turn}")
        press(page, "Enter")
        page.wait_for_selector(".choice")
        press(page, "2", "k")
        page.wait_for_selector("textarea:not([disabled])")
    saved(page, labeling, 4)
    (first, second) = (Item.read(store.items[str(e.item)]) for e in store.events if e.kind == "label")
    shown = store.events[0].value["shown"]
    assert second.comparison.prompt[1]["content"] == first.comparison.responses[shown[1]]
    assert page.locator(".turn").count() == 4
    press(page, "Escape", "u")
    page.wait_for_selector(".card.selected")
    press(page, "u")
    page.wait_for_selector("textarea:not([disabled])")
    assert page.input_value("textarea") == "Hello 1"


@pytest.mark.parametrize("mode", ["compare", "rank", "edit", "chat"])
def test_a_phone(tabs: Tabs, serve: Any, tmp_path: Path, mode: str) -> None:
    """Nothing is wider than 390 pixels, and everything can be done by tapping."""
    code = "```\n" + "x = 1; " * 60 + "\n```\n" + "w" * 300
    given = [{"prompt": code, "responses": [code, code + "!", "c"], "ranking": [0, 1, 2]}]
    labeling = labeling_of(tmp_path, items_of(given, mode), ("anna",), mode, page={"instructions": "Be kind."})
    page = tabs.open(serve(labeling).links["anna"], width=390)
    page.tap("dialog .primary")
    if mode == "chat":
        page.tap("text=Send")
        page.wait_for_selector(".choice")
        page.tap(".choose >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    if mode in ("rank", "edit"):
        page.tap("[aria-label='Move down'] >> nth=0") if mode == "rank" else page.fill("textarea", "better")
        page.tap(".bar .primary")
    else:
        page.tap(".point >> nth=1")
    saved(page, labeling, 2 if mode == "chat" else 1)
    assert labeling.store.events[-1].kind == "label"
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_dark_and_light_have_contrast(chromium: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(labeling_of(tmp_path, rows(1), ("anna",)))
    seen = []
    for scheme in ("light", "dark"):
        context = chromium.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(server.links["anna"])
        page.wait_for_selector(".card")
        style = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
        text, ground = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in page.evaluate(style))
        seen.append(text < ground)
        assert abs(text - ground) > 500  # of 765
        context.close()
    assert seen == [True, False]


class Command:
    """`rlhf stage=label` in a folder, until it is ended."""

    def __init__(self, folder: Path) -> None:
        self.out = (folder / "out.txt").open("w+")
        arguments = ["stage=label", "data.train=rows.jsonl", "label.annotators=[anna]", "label.database=labels.db"]
        self.process = fork_server().start(arguments, folder, environment(folder), self.out, self.out)
        deadline = time.monotonic() + 60
        while "Ctrl-C ends it" not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.link = next(line.split()[-1] for line in self.text().splitlines() if line.startswith("  anna "))

    def text(self) -> str:
        self.out.flush()
        return Path(self.out.name).read_text()

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal and return the exit code and what was printed."""
        self.process.send_signal(number)
        code, text = self.process.wait(), self.text()
        self.out.close()
        return code, text


@pytest.mark.slow
def test_a_server_that_is_killed_loses_nothing(tabs: Tabs, tmp_path: Path) -> None:
    """The page says that the server is gone; after a new start the labels are there, and undo goes back."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(6)))
    command = Command(tmp_path)
    page = tabs.open(command.link)
    for count in range(1, 4):
        press(page, "k")
        progressed(page, f"{count} of 6")
    assert command.end(signal.SIGKILL)[0] == -signal.SIGKILL
    press(page, "k")
    page.wait_for_selector("text=Not saved: the server cannot be reached")
    command = Command(tmp_path)
    again = tabs.open(command.link)
    progressed(again, "3 of 6")
    press(again, "u")
    progressed(again, "2 of 6")
    code, printed = command.end(signal.SIGINT)
    assert code == 0
    labels = next(Path(tmp_path, line.split()[-1]) for line in printed.splitlines() if line.endswith("/labels.jsonl"))
    assert len(labels.read_text().splitlines()) == 2
    assert (labels.parent / "card.md").is_file()
    store = Store(tmp_path / "labels.db")
    store.close()
    assert [event.kind for event in store.events] == ["label"] * 3 + ["undo"]
    for log in labels.parent.rglob("*.log"):
        assert command.link.partition("#")[2] not in log.read_text()
    assert Command(tmp_path).end(signal.SIGTERM)[0] == 143
