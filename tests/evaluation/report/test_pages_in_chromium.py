"""The pages in headless Chromium: hostile text is text, nothing is asked for, and a phone shows all without scrolling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.evaluation.report.compare import write_comparison
from rlhf_lightning.evaluation.report.page import write_report
from tests.helpers.results import EVALUATED, answers, stored_pipeline

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MARKUP = (
    "<script>document.title='ran'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='ran'\">"
    "</pre></style></svg><iframe src=http://127.0.0.1:9/y></iframe><svg onload=\"document.title='ran'\">"
    "{{ 7 * 7 }} \u202etxet desrever\u202c \x1b[31m \x00 <meta http-equiv=refresh content='0;url=http://127.0.0.1:9/z'>"
)
LONG = "w" * 1_000_000
TABLES = {
    "ngrams": [{"model": MARKUP, "ngram": f"{MARKUP} $x^", "effect": 0.5, "low": 0.4, "high": 0.6}],
    "margins": [{"model": LONG, "bucket": LONG, "accuracy": 0.6, "low": 0.5, "high": 0.7, "count": 9}],
    "probes": [
        {"probe": MARKUP, "model": LONG, "metric": MARKUP, "value": 0.5, "low": 0.4, "high": 0.6, "alarm": MARKUP}
    ],
    "win_rates": [{"model": LONG, "opponent": MARKUP, "by": MARKUP, "win_rate": 0.5, "low": 0.4, "high": 0.6}],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison of pipelines whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    made = []
    for name, text in (("one", MARKUP), ("two", LONG)):
        samples = answers(sft=["1 a", "1 b"], ppo=[f"0 {text}", f"1 {text}"])
        for rows in samples.values():
            for row in rows:
                row |= {"prompt": row["prompt"] + text, text: 1.0}
        metrics = {key.replace("ppo", text[:300].replace("/", "|")): value for key, value in EVALUATED.items()}
        config = {"evaluate": {text[:300]: text, "models": {}}}
        made.append(stored_pipeline(folder / name, metrics=metrics, samples=samples, tables=TABLES, config=config))
    write_report(made[0])
    compared = write_comparison({MARKUP: made[0], "other": made[1]}, folder)
    return {"report": made[0] / "report.html", "compare": compared}


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("report", 390),
        ("compare", 1280),
        pytest.param("report", 1280, marks=pytest.mark.nightly),
        pytest.param("compare", 390, marks=pytest.mark.nightly),
    ],
)
def test_hostile_text_is_shown_as_text(name: str, width: int, chromium: Any, pages: dict[str, Path]) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    requests, errors = list[str](), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(pages[name].as_uri())
    page.wait_for_timeout(200)
    assert requests == [pages[name].as_uri()]
    assert errors == []
    assert page.title() != "ran"
    elements = {element.evaluate("e => e.tagName") for element in page.query_selector_all("script,img,iframe,object,a")}
    assert elements <= {"A"}
    assert all(link.get_attribute("href").startswith("#") for link in page.query_selector_all("a"))
    text = page.inner_text("body")
    assert "<script>document.title='ran'</script>" in text
    assert "{{ 7 * 7 }} ⟨U+202E⟩txet desrever⟨U+202C⟩" in text
    assert "more characters)" in text
    assert "\u202e" not in page.content()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert pages[name].stat().st_size < 5e6
    context.close()


@pytest.mark.nightly
def test_a_page_prints(chromium: Any, pages: dict[str, Path]) -> None:
    page = chromium.new_page()
    page.goto(pages["report"].as_uri())
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
