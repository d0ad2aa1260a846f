"""The revise stage: demonstrations with their history, from the model itself, the world's teacher or a server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf_lightning.feedback.shards import places
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.world import gold
from tests.helpers.cli import newest, rlhf

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("revise")]


class Handler(BaseHTTPRequestHandler):
    """Answers with a digest of what was said; with nothing, or with 500 after some requests, when it is told to."""

    silent: ClassVar[bool] = False
    left: ClassVar[float] = float("inf")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps(json.loads(body)["messages"])
        Handler.left -= 1
        content = "" if Handler.silent else hashlib.sha256(said.encode()).hexdigest()[:8]
        answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200 if Handler.left >= 0 else 500)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of a server with such a handler."""
    pytest.importorskip("openai")
    Handler.silent, Handler.left = False, float("inf")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and a model that knows nothing."""
    folder = tmp_path_factory.mktemp("revise")
    texts = [f"Say {i}. It is {i}." for i in range(12)]
    build_tiny(folder / "model", texts, vocab_size=280, hidden_size=16, layers=1, heads=2, max_length=512)
    rows = [{"id": f"p{i}", "prompt": f"Say {i}.", "label": "safe" if i % 2 else "unsafe"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BASE = ["init_from=model", "data.template=human_assistant", "data.batch_size=4", "revise.max_new_tokens=6"]


def revised(folder: Path, name: str, *more: str, code: int | None = 0) -> tuple[Path, str]:
    done = rlhf(folder, "stage=revise", f"name={name}", *BASE, *more, code=code)
    run = max((folder / "outputs" / "revise" / name).iterdir())
    return run, done.stdout + done.stderr


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def served(url: str, *more: str) -> list[str]:
    judge = ["judge=server", "judge.model=m", f"judge.base_url={url}", "judge.retries=0"]
    return ["data.train=prompts.jsonl", "revise.teacher=judge", *judge, *more]


def test_on_the_world_the_scripted_teacher_makes_answers_better(folder: Path) -> None:
    more = [
        "data=world", "data.world.rows=24", "judge=world", "revise.teacher=judge", "revise.constitution=world",
        "revise.rounds=3", "gold_from=world",
    ]  # fmt: skip
    run, printed = revised(folder, "world", *more)
    rows = read(run / "demonstrations.jsonl")
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(rows) == metrics["rows"] == 24
    totals = [sum(gold(row, row[name]).total for row in rows) / 24 for name in ("first_answer", "response")]
    assert [metrics["first/gold"], metrics["revision_3/gold"]] == pytest.approx(totals, abs=1e-6)
    assert metrics["first/gold"] < metrics["revision_1/gold"] < metrics["revision_3/gold"]
    assert metrics["revision_3/refused_harmful"] > metrics["first/refused_harmful"]
    assert 0 < metrics["revision_1/unchanged"] < 1
    assert "24 answers, revised" in printed
    assert not (run / "shards").exists()
    assert read(run / "failures.jsonl") == []
    rlhf(folder, "stage=sft", "init_from=model", "data=demonstrations/jsonl", f"data.train={run}/demonstrations.jsonl",
         "data.template=human_assistant", "max_steps=1", "name=of_revisions")  # fmt: skip
    assert (newest(folder, "sft") / "model" / "manifest.json").is_file()


def test_a_server_that_fails_midway_loses_nothing(folder: Path, url: str) -> None:
    whole, _ = revised(folder, "whole", *served(url))
    rows = read(whole / "demonstrations.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(10)]
    assert all(len(row["response"]) == 8 for row in rows)
    Handler.left = 11  # of 20 requests: the first batch is whole
    more = served(url, "resume=auto")
    run, printed = revised(folder, "broken", *more, code=2)
    assert "answered 500" in printed
    assert "Traceback" not in printed
    assert len(places(run / "shards")) == 4
    Handler.left = float("inf")
    again, _ = revised(folder, "broken", *more)
    assert again == run
    assert read(run / "demonstrations.jsonl") == rows


def test_a_teacher_that_returns_nothing(folder: Path, url: str) -> None:
    Handler.silent = True
    run, printed = revised(folder, "silent", *served(url), code=2)
    assert "none of 10 answers could be revised (10: empty critique)" in printed
    assert {row["failure"] for row in read(run / "failures.jsonl")} == {"empty critique"}
    assert not (run / "demonstrations.jsonl").exists()


def test_the_model_itself_with_examples_and_refusals_by_label(folder: Path) -> None:
    more = [
        "data.train=prompts.jsonl",
        "revise.examples=1",
        "gold_from=rlhf_lightning.evaluation.refusal:refusal_reward",
    ]
    run, _ = revised(folder, "self", *more, code=None)
    done = read(run / "failures.jsonl")
    if (run / "metrics.json").is_file():
        assert "first/over_refused" in json.loads((run / "metrics.json").read_text())
        done += read(run / "demonstrations.jsonl")
    assert len(done) == 10  # whatever such a model says


def test_a_changed_constitution_is_another_run(folder: Path, url: str) -> None:
    file = folder / "mine.yaml"
    file.write_text("principles: [{name: kind, judge: Be kind.}]\n")
    more = served(url, "revise.constitution=./mine.yaml", "resume=auto")
    first, _ = revised(folder, "mine", *more)
    assert revised(folder, "mine", *more)[0] == first
    file.write_text("principles: [{name: brief, judge: Be brief.}]\n")
    other, _ = revised(folder, "mine", *more)
    assert other != first
    assert {step["principle"] for row in read(other / "demonstrations.jsonl") for step in row["revisions"]} == {"brief"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revise.teacher=slef"], "revise.teacher=slef is not one of self, judge. Did you mean 'self'?"),
        (["revise.teacher=judge"], "revise.teacher=judge needs a judge that can teach: judge=local, server or world"),
        (["revise.rounds=0"], "revise.rounds=0 is not a whole number in [1, inf)"),
        (["revise.constitution=wordl"], "there is no constitution 'wordl'"),
        (["revise.constitution=./prompts.jsonl"], "prompts.jsonl is not"),
        (["revise.examples=4"], "revise.examples=4: the constitution has 3"),
        (["revise.max_new_tokens=0"], "revise.max_new_tokens=0"),
        (["gold_from=rlhf_lightning.evaluation.refusal:refusal_reward", "data.columns={prompt: id}"], "column"),
        (["judge=world", "revise.teacher=judge"], "revise.constitution: the built-in world has no principle"),
        (["judge=world", "revise.teacher=judge", "revise.constitution=world"], "row 1 is no row of the built-in world"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, arguments: list[str], message: str) -> None:
    done = rlhf(folder, "stage=revise", "name=bad", *BASE, "data.train=prompts.jsonl", *arguments, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
