"""Answers to a conversation, from a model in this process and from a server."""

from __future__ import annotations

import os
import threading
import time
from unittest.mock import patch

import pytest
import torch

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.chat import LocalChat, ServerChat
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from tests.helpers.openai_server import Sent, completion, openai_server

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


@patch.dict(os.environ, OPENAI_API_KEY="the-key")
def test_a_server_is_asked_until_there_are_enough() -> None:
    with openai_server(lambda body, number: completion(f"answer {number}")) as server:
        chat = ServerChat(server.url, "m", max_new_tokens=7, temperature=0.5)
        assert chat(HELLO, 2, (0,)) == ["answer 1", "answer 2"]
    path, key, body = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer the-key")
    assert body == {"model": "m", "messages": HELLO, "n": 2, "temperature": 0.5, "max_tokens": 7}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (Sent({"error": 1}), "cannot be used: its answer has no choices"),
        (Sent({"choices": []}), "returned no answer"),
        (Sent({"choices": [{"text": "old"}]}), "a choice without a message"),
        (Sent({"error": "who?"}, 401), "answered 401 .*OPENAI_API_KEY"),
    ],
)
@patch.dict(os.environ, OPENAI_API_KEY="the-key")
def test_what_a_server_may_say(sent: Sent, message: str) -> None:
    with openai_server(lambda body, number: sent) as server, pytest.raises(UserError, match=message) as caught:
        ServerChat(server.url, "m")(HELLO, 1, (0,))
    assert "the-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match="cannot be used: .*refused"):
        ServerChat("http://127.0.0.1:9/v1", "m")(HELLO, 1, (0,))
    for given in ("file:///etc/passwd", "localhost:8000", "http://user:pass@host/v1"):
        with pytest.raises(UserError, match=r"label\.base_url=.* is not a URL such as"):
            ServerChat(given, "m")
    with pytest.raises(UserError, match="needs label.model"):
        ServerChat("http://127.0.0.1:9/v1", None)
