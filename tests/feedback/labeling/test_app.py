"""The page over HTTP: who may ask, what is refused, and that no confirmed label is lost or doubled."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.app import OVERVIEW, STATIC, application
from rlhf_lightning.feedback.labeling.overview import overview
from rlhf_lightning.feedback.labeling.security import LARGEST_BODY, Links, hostname
from rlhf_lightning.feedback.labeling.server import annotator_names, listen
from rlhf_lightning.feedback.labeling.service import Labeling
from tests.helpers.labeling import items_of, labeling_of, rows

ORIGIN = "http://127.0.0.1:8765"


class Browser:
    """A tab of one annotator, or of the overview."""

    def __init__(self, app: Any, name: str, token: str | None = None) -> None:
        self.client, self.name, self.tab = TestClient(app, base_url=ORIGIN), name, ""
        if token is not None:
            answer = self.post("open", token=token)
            assert answer.status_code == 200, answer.text
            self.tab, self.state = answer.json()["tab"], answer.json()["state"]

    def post(self, action: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
        given = {"Origin": ORIGIN, "X-Tab": self.tab} | (headers or {})
        return self.client.post(f"/a/{self.name}/{action}", json=body, headers=given)

    def label(self, request: str, value: int = 1, item: str | None = None) -> Any:
        item = item or self.state["task"]["item"]
        answer = self.post("label", item=item, request=request, value=value, seconds=1)
        self.state = answer.json()["state"]
        return answer


@pytest.fixture
def labeling(tmp_path: Path) -> Labeling:
    """Two annotators and five rows."""
    return labeling_of(tmp_path, rows(5))


@pytest.fixture
def links() -> Links:
    """Their links."""
    return Links(["anna", "ben", OVERVIEW])


@pytest.fixture
def app(labeling: Labeling, links: Links) -> Any:
    """The application."""
    return application(labeling, links)


@pytest.fixture
def anna(app: Any, links: Links) -> Browser:
    """A tab in which Anna's link is open."""
    return Browser(app, "anna", links.token("anna"))


def test_a_label_by_its_link(anna: Browser, labeling: Labeling) -> None:
    assert anna.state["task"]["responses"]
    assert anna.label("r1", -2).status_code == 200
    assert [(e.kind, e.annotator, e.value["value"]) for e in labeling.store.events] == [("label", "anna", -2)]
    assert anna.state["done"] == 1


def test_nothing_without_the_link(app: Any, links: Links, labeling: Labeling) -> None:
    for token in ("", "wrong", links.token("ben"), links.token(OVERVIEW), None, 3):
        stranger = Browser(app, "anna")
        assert stranger.post("open", token=token).status_code == 403
    for action in ("state", "label", "undo", "withdraw"):
        answer = Browser(app, "anna").post(action, item="x", request="r")
        assert answer.status_code == 403
        assert "This link is not known here" in answer.json()["error"]
        assert "task" not in answer.text
    assert Browser(app, "nobody").post("open", token="x").status_code == 403
    assert labeling.store.events == []


def test_the_cookie_is_closed_to_scripts_and_other_sites(app: Any, links: Links) -> None:
    answer = Browser(app, "anna").post("open", token=links.token("anna"))
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "Path=/a/anna", "SameSite=strict"} <= {part.strip() for part in cookie.split(";")}
    assert links.token("anna") not in cookie
    assert links.token("anna") not in answer.text


def test_annotators_cannot_act_for_each_other_or_open_the_overview(anna: Browser, app: Any) -> None:
    for name in ("ben", OVERVIEW):
        answer = anna.client.post(f"/a/{name}/state", json={}, headers={"Origin": ORIGIN, "X-Tab": anna.tab})
        assert answer.status_code == 403


def test_the_tab_that_was_opened_last_counts(anna: Browser, app: Any, links: Links, labeling: Labeling) -> None:
    """A link in a second tab or browser takes over; the first one is told, and can take over again."""
    item = anna.state["task"]["item"]
    second = Browser(app, "anna", links.token("anna"))
    assert second.state["task"]["item"] == item
    answer = anna.post("label", item=item, request="r1", value=1)
    assert (answer.status_code, answer.json()["reason"]) == (409, "stale")
    assert "another tab or browser" in answer.json()["error"]
    assert labeling.store.events == []
    again = anna.post("open")  # by the cookie
    assert again.status_code == 200
    anna.tab = again.json()["tab"]
    assert anna.post("label", item=item, request="r1", value=1).status_code == 200
    assert second.post("state").json()["reason"] == "stale"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:8765"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "evil@127.0.0.1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1234"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"X-Tab": ""}, 403),
        ({"X-Tab": "guess"}, 403),
    ],
)
def test_requests_of_other_sites_are_refused(
    anna: Browser, labeling: Labeling, headers: dict[str, str], status: int
) -> None:
    answer = anna.post("label", headers, item=anna.state["task"]["item"], request="r", value=1)
    assert answer.status_code == status
    assert labeling.store.events == []


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:9000", "[::1]:9000"])
def test_a_tunnel_may_have_another_port(app: Any, links: Links, host: str) -> None:
    answer = Browser(app, "anna").post("open", {"Host": host, "Origin": f"http://{host}"}, token=links.token("anna"))
    assert answer.status_code == 200
    assert hostname(host) in ("localhost", "127.0.0.1", "::1")


def test_large_and_broken_bodies(anna: Browser, labeling: Labeling) -> None:
    def send(content: Any, **headers: str) -> Any:
        given = {"Origin": ORIGIN, "X-Tab": anna.tab, "Content-Type": "application/json"} | headers
        return anna.client.post("/a/anna/label", content=content, headers=given)

    assert send(b" " * (LARGEST_BODY + 1)).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (LARGEST_BODY // 10)

    assert send(chunks()).status_code == 413
    for content in (b"", b"[]", b"null", b"{", b"\xff", b"[" * 10_000):
        assert send(content).status_code == 400
    assert anna.post("label", item=3, request="r").status_code == 400
    assert anna.post("label", item="x", request="r" * 101).status_code == 400
    assert anna.post("nothing").status_code == 400
    assert anna.client.put("/a/anna/label", json={}).status_code == 405
    assert labeling.store.events == []


def test_every_answer_has_the_headers(app: Any) -> None:
    client = TestClient(app, base_url=ORIGIN)
    for path in ("/a/anna", f"/a/{OVERVIEW}", "/static/page.js", "/static/none.js", "/none"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    assert client.get("/static/..%2Fapp.py").status_code == 404


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_texts() -> None:
    assert {"index.html", "overview.html", "page.js", "views.js", "style.css"} <= STATIC.keys()
    for name, (content, _) in STATIC.items():
        text = content.decode()
        urls = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "DOMParser",
            "srcdoc",
            "Function(",
        ):
            assert word not in text, f"{name}: {word}"
        if name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|style=", text)


def test_a_double_click_is_one_label(anna: Browser, labeling: Labeling) -> None:
    body = {"item": anna.state["task"]["item"], "value": 1}
    assert [anna.post("label", request="same", **body).status_code for _ in range(3)] == [200] * 3
    answer = anna.post("label", request="other", **body)
    assert (answer.status_code, answer.json()["reason"]) == (409, "labeled")
    assert answer.json()["state"]["task"]["item"] != body["item"]
    assert len(labeling.store.events) == 1


def test_an_item_that_is_gone_is_told_and_recorded(anna: Browser, labeling: Labeling) -> None:
    answer = anna.post("label", item="gone", request="r", value=1)
    assert answer.status_code == 409
    assert "not in the data any more" in answer.json()["error"]
    assert answer.json()["state"]["task"]
    assert [event.kind for event in labeling.store.events] == ["refused"]


def test_the_overview(app: Any, links: Links, anna: Browser, labeling: Labeling) -> None:
    for number in range(3):
        anna.label(f"r{number}")
    above = Browser(app, OVERVIEW, links.token(OVERVIEW))
    by_name = {row["annotator"]: row for row in above.state["annotators"]}
    assert (by_name["anna"]["labels"], by_name["ben"]["labels"], above.state["left"]) == (3, 0, 2)
    after = above.post("withdraw", annotator="anna", request="w").json()["state"]
    assert after["labels"] == 0
    assert labeling.store.events[-1].value == {"by": "who runs it"}
    told = anna.post("label", item=anna.state["task"]["item"], request="r9", value=1)
    assert told.json()["reason"] == "withdrawn"
    assert above.post("withdraw", annotator="nobody", request="w2").status_code == 507
    assert above.post("undo", request="u").status_code == 400


def test_percent_agreement_and_checks(tmp_path: Path) -> None:
    checks = items_of([{"prompt": f"{i}+{i}", "chosen": f"{2 * i}", "rejected": "no"} for i in range(4)], checks=True)
    labeling = labeling_of(tmp_path, rows(4), overlap=1.0, checks=checks, check_share=1.0)
    for name in ("anna", "ben"):
        while (task := labeling.state(name)["task"]) is not None:
            known = labeling.tasks.checks.get(task["item"])
            item = known or labeling.tasks.items[task["item"]]
            best = item.comparison.responses[0]  # Anna prefers the first of the row always, Ben in rows 0 to 2
            if name == "ben" and (known is None) and item.comparison.id == "row-3":
                best = item.comparison.responses[1]
            value = -2 if task["responses"][0] == best else 2
            labeling.label(name, task["item"], f"{name}{task['item']}", {"value": value, "seconds": 4})
    figures = overview(labeling)
    assert figures["agreement"] == pytest.approx(7 / 8)  # of 4 items and 4 check questions
    assert [row["agreement"] for row in figures["annotators"]] == pytest.approx([7 / 8, 7 / 8])
    assert [(row["checks_passed"], row["checks"]) for row in figures["annotators"]] == [(4, 4), (4, 4)]
    assert figures["seconds"] == 4


@pytest.mark.slow
def test_500_labels_of_several_at_once(tmp_path: Path) -> None:
    """None is lost and none is doubled, although every request is sent twice and several wait for one store."""
    names = [f"a{number}" for number in range(5)]
    labeling = labeling_of(tmp_path, rows(500), names)
    links = Links([*names, OVERVIEW])
    app = application(labeling, links)
    confirmed: dict[str, list[str]] = {name: [] for name in names}

    def work(name: str) -> None:
        browser = Browser(app, name, links.token(name))
        with browser.client:
            while browser.state["task"]:
                item = browser.state["task"]["item"]
                for _ in range(2):
                    answer = browser.label(f"{name}-{item}", item=item)
                    assert answer.status_code == 200
                confirmed[name].append(item)

    threads = [threading.Thread(target=work, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    labels = [(event.annotator, event.item) for event in labeling.store.events]
    assert len(labels) == len(set(labels)) == 500
    assert sorted(labels) == sorted((name, item) for name, items in confirmed.items() for item in items)
    assert {item for _, item in labels} == labeling.tasks.items.keys()


# ---- names and ports -------------------------------------------------------------------------------------------------


def test_names_of_annotators() -> None:
    assert annotator_names(2) == ["annotator-1", "annotator-2"]
    assert annotator_names(["anna", "ben"]) == ["anna", "ben"]
    for given in (
        0,
        True,
        5000,
        [],
        ["anna", "anna"],
        ["a b"],
        ["../x"],
        [OVERVIEW],
        ["é"],
        ["x" * 41],
        3.5,
        None,
        {"a": 1},
    ):
        with pytest.raises(UserError, match="label.annotators"):
            annotator_names(given)


def test_a_port_in_use_names_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"label.port={port} is in use; \d+ is free") as caught:
            listen(port)
    free = int(re.findall(r"(\d+) is free", str(caught.value))[0])
    with listen(free) as opened:
        assert opened.getsockname() == ("127.0.0.1", free)
    for wrong in (0, 70_000, "x"):
        with pytest.raises(UserError, match="label.port="):
            listen(wrong)
