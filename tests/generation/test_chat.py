"""Answers to a conversation, from a model in this process and from a server."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.chat import LocalChat, ServerChat
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalChat:
    folder = build_tiny(
        tmp_path_factory.mktemp("chat") / "model", ["Say hello. Hello!"], vocab_size=270, hidden_size=16, layers=1,
        heads=2, max_length=64,
    )  # fmt: skip
    template = Template(load_tokenizer(folder))
    return LocalChat(load_causal_lm(folder).eval(), template, LocalEngine(), context=64, max_new_tokens=4)


def test_answers_are_the_seed_s(local: LocalChat) -> None:
    first = local(HELLO, 3, (0, "a"))
    assert len(first) == 3
    assert len(set(first)) > 1
    assert local(HELLO, 3, (0, "a")) == first
    assert local(HELLO, 3, (1, "a")) != first


def test_a_conversation_that_is_too_long(local: LocalChat) -> None:
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, and the model reads at most 64"):
        local([{"role": "user", "content": "hello " * 60}], 1, (0,))


def test_a_call_in_another_thread_is_ended(local: LocalChat) -> None:
    chat = LocalChat(local.engine.lm, local.template, LocalEngine(), max_new_tokens=10**6)
    chat.engine.eos = torch.tensor([], dtype=torch.long)  # it would go on
    raised: list[str] = []

    def ask() -> None:
        with pytest.raises(UserError) as caught:
            chat(HELLO, 1, (0,))
        raised.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    while not chat._mutex.locked():
        time.sleep(0.001)
    chat.close()
    thread.join(20)
    assert raised == ["it was closed"]
    with pytest.raises(UserError, match="it was closed"):
        chat(HELLO, 1, (0,))


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that returns one choice at a time, or what the model's name says."""

    seen: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append((self.path, self.headers.get("authorization"), body))
        answers: dict[str, tuple[int, Any]] = {
            "broken": (200, {"error": 1}), "none": (200, {"choices": []}), "forbidden": (401, {"error": "who?"}),
        }  # fmt: skip
        choice = {"message": {"content": f"answer {len(self.seen)}"}}
        status, answer = answers.get(body["model"], (200, {"choices": [choice]}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of such a server."""
    Server.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@patch.dict(os.environ, OPENAI_API_KEY="the-key")
def test_a_server_is_asked_until_there_are_enough(url: str) -> None:
    assert ServerChat(url, "m", max_new_tokens=7, temperature=0.5)(HELLO, 2, (0,)) == ["answer 1", "answer 2"]
    path, key, body = Server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer the-key")
    assert body == {"model": "m", "messages": HELLO, "n": 2, "temperature": 0.5, "max_tokens": 7}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("broken", "cannot be used: KeyError"),
        ("none", "returned no answer"),
        ("forbidden", "answered 401 .*OPENAI_API_KEY"),
    ],
)
@patch.dict(os.environ, OPENAI_API_KEY="the-key")
def test_what_a_server_may_say(url: str, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ServerChat(url, model)(HELLO, 1, (0,))
    assert "the-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used: .*refused"):
        ServerChat("http://127.0.0.1:9/v1", "m")(HELLO, 1, (0,))
    for given in ("file:///etc/passwd", "localhost:8000", "http://user:pass@host/v1"):
        with pytest.raises(UserError, match="is not a URL such as"):
            ServerChat(given, "m")
    with pytest.raises(UserError, match="needs label.model"):
        ServerChat("http://127.0.0.1:9/v1", None)
