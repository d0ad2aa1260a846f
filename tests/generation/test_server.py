"""The client of OpenAI-compatible servers, against a server on loopback that misbehaves."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from unittest.mock import patch

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.server import LARGEST, Server, ServerError, concurrently, retry_after
from tests.helpers.openai_server import FakeServer, Sent, completion, openai_server

KEY = "sk-do-not-print-me"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def key() -> Iterator[None]:
    with patch.dict(os.environ, OPENAI_API_KEY=KEY):
        yield


def client(server: FakeServer, **options: Any) -> Server:
    return Server(server.url, **{"timeout": 5, "backoff": 0.001} | options)


def test_the_request() -> None:
    with openai_server(lambda body, n: completion("hello")) as server:
        assert client(server).chat(**BODY)["choices"][0]["message"]["content"] == "hello"
        del os.environ["OPENAI_API_KEY"]
        client(server).chat(**BODY)
    assert server.seen == [("/v1/chat/completions", f"Bearer {KEY}", BODY), ("/v1/chat/completions", None, BODY)]


@pytest.mark.parametrize("first", [
    Sent({"error": "slow down"}, 429), Sent({"error": "slow down"}, 429, {"retry-after": "0"}),
    Sent(b"oops", 500), Sent(b"", 503), Sent(b'{"choices": [{"mess'), Sent(b"<html>garbage"), Sent({"choices": None}),
    Sent(b'{"choices"', headers={"x-missing": "10"}), Sent(b"[" * 9000),
])  # fmt: skip
def test_what_may_pass_is_tried_again(first: Sent) -> None:
    with openai_server(lambda body, n: first if n < 3 else completion("at last")) as server:
        assert client(server, retries=2).chat(**BODY)["choices"][0]["message"]["content"] == "at last"
        assert len(server.seen) == 3
    with openai_server(lambda body, n: first) as server, pytest.raises(ServerError) as caught:
        client(server, retries=1).chat(**BODY)
    assert len(server.seen) == 2
    assert caught.value.passing
    assert "\n" not in str(caught.value)


def test_the_server_says_when() -> None:
    with openai_server(lambda b, n: Sent({}, 429, {"retry-after": "0.2"}) if n < 2 else completion("x")) as server:
        began = time.monotonic()
        client(server, retries=1, backoff=60.0).chat(**BODY)
        assert 0.2 <= time.monotonic() - began < 20
    with openai_server(lambda b, n: Sent({}, 429, {"retry-after": "9999"})) as server:
        with pytest.raises(ServerError, match="answered 429 .*it asks to wait 9999 seconds"):
            client(server, retries=3).chat(**BODY)
        assert len(server.seen) == 1
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after(later) == pytest.approx(30, abs=2)
    assert [retry_after(value) for value in ("3", "-1", "nan", "soon", None)] == [3.0, 0.0, None, None, None]


def test_back_off_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with openai_server(lambda body, n: Sent(b"", 500)) as server:
        one = client(server, retries=4, backoff=1.0)
        monkeypatch.setattr(one._closed, "wait", lambda seconds: waits.append(seconds) or False)
        with pytest.raises(ServerError, match="answered 500 Internal Server Error"):
            one.chat(**BODY)
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            Sent({"error": f"the key {KEY} is wrong"}, 401),
            r"answered 401 Unauthorized: .*the key is read from OPENAI_API_KEY",
        ),
        (Sent({"error": "no such model"}, 404), "answered 404 Not Found"),
        (Sent({"choices": []}, headers={"content-encoding": "gzip"}), "is compressed"),
        (Sent(b"x" * (LARGEST + 1)), "more than 8 MiB"),
    ],
)
def test_what_does_not_pass_is_one_line(sent: Sent, message: str) -> None:
    with openai_server(lambda body, n: sent) as server, pytest.raises(ServerError, match=message) as caught:
        client(server, retries=3).chat(**BODY)
    assert len(server.seen) == 1
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_gets_no_key(status: int) -> None:
    with openai_server(lambda body, n: completion("elsewhere")) as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        with openai_server(lambda body, n: Sent(b"", status, {"location": target})) as server:
            one = client(server, retries=3)
            with pytest.raises(ServerError, match=f"redirects to {target}, which is refused"):
                one.chat(**BODY)
        assert elsewhere.seen == []
    assert len(server.seen) == 1


def test_a_slow_server() -> None:
    def trickle() -> Iterator[bytes]:
        for _ in range(60):
            time.sleep(0.02)
            yield b" "

    with openai_server(lambda body, n: Sent(trickle())) as server:
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"gave no answer in 0\.1 seconds"):
            client(server, timeout=0.1).chat(**BODY)
        assert time.monotonic() - began < 1
    with (
        openai_server(lambda body, n: time.sleep(0.5)) as server,
        pytest.raises(ServerError, match="gave no answer in"),
    ):
        client(server, timeout=0.05).chat(**BODY)


def test_headers_that_never_end() -> None:
    """Each read is in time, the answer is not."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for number in range(40):
                with suppress(OSError):
                    connection.sendall(f"x-{number}: y\r\n".encode())
                time.sleep(0.05)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"gave no answer in 0\.2 seconds") as caught:
        Server(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.2).chat(**BODY)
    assert time.monotonic() - began < 1.5
    assert caught.value.passing
    listening.close()
    thread.join()


def test_nobody_is_there() -> None:
    with pytest.raises(ServerError, match="127.0.0.1:9/v1 cannot be used: .*refused"):
        Server("http://127.0.0.1:9/v1", retries=1, backoff=0.001).chat(**BODY)
    for given in ("file:///etc/passwd", "localhost:8000", "http://user:pass@host/v1", "ftp://host/v1"):
        with pytest.raises(UserError, match=r"judge\.base_url=.* is not a URL such as"):
            Server(given)


def test_a_repeated_key_is_not_in_the_answer() -> None:
    with openai_server(lambda body, n: completion(f"your key is {KEY}")) as server:
        assert client(server).chat(**BODY)["choices"][0]["message"]["content"] == "your key is $OPENAI_API_KEY"


def test_a_closed_client_does_not_wait() -> None:
    with openai_server(lambda body, n: Sent(b"", 500)) as server:
        one = client(server, retries=5, backoff=60.0)
        one._closed.set()
        with pytest.raises(ServerError, match="answered 500"):
            one.chat(**BODY)
        assert len(server.seen) == 1


def test_names_of_models() -> None:
    with openai_server(lambda body, n: completion("x"), models=("a", "b")) as server:
        assert client(server).models() == ["a", "b"]
    assert Server("http://127.0.0.1:9/v1").models() == []


def test_so_many_at_a_time_and_none_after_the_end() -> None:
    running, most, called = itertools.count(), [0], []
    active: set[int] = set()

    def work(item: int) -> int:
        active.add(item)
        most[0] = max(most[0], len(active))
        time.sleep(0.005)
        active.discard(item)
        called.append(next(running))
        if item == 3:
            raise ValueError("three")
        return item * item

    results = dict(concurrently(work, range(20), 4))
    assert 1 < most[0] <= 4
    assert isinstance(results.pop(3), ValueError)
    assert results == {i: i * i for i in range(20) if i != 3}
    called.clear()
    calls = concurrently(work, range(100), 2)
    next(calls)
    time.sleep(0.1)
    assert 3 <= len(called) <= 5  # one taken, two waiting, and what two threads had begun
    calls.close()
    time.sleep(0.05)
    assert len(called) <= 5
