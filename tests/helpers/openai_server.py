"""An OpenAI-compatible server on loopback that answers as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Sent:
    """What a server sends: an object as JSON, or bytes as they are, block by block."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeServer:
    """A running server: its URL, and every request as (path, key, body)."""

    url: str
    seen: list[tuple[str, str | None, Any]]


def completion(text: str | None, prompt_tokens: int = 10, top: dict[str, float] | None = None) -> dict[str, Any]:
    """Return a chat completion; `top` maps tokens to log-probabilities of the first one."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return {"id": "x", "choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}}


@contextmanager
def openai_server(answer: Callable[[Any, int], Any], models: tuple[str, ...] = ("m",)) -> Iterator[FakeServer]:
    """Serve `answer(body, number of the request)`, a :class:`Sent` or what is sent as JSON with status 200."""
    listed = {"object": "list", "data": [{"id": name} for name in models]}
    with serve(lambda path, body, number: listed if body is None else answer(body, number)) as server:
        yield server


@contextmanager
def serve(answer: Callable[[str, Any, int], Any]) -> Iterator[FakeServer]:
    """Serve `answer(path, body, number of the request)`; a GET has no body."""
    seen: list[tuple[str, str | None, Any]] = []
    mutex = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with mutex:
                seen.append((self.path, self.headers.get("authorization"), body))
                number = len(seen)
            self.send(answer(self.path, body, number))

        def do_GET(self) -> None:
            with mutex:
                seen.append((self.path, self.headers.get("authorization"), None))
                number = len(seen)
            self.send(answer(self.path, None, number))

        def send(self, made: Any) -> None:
            sent = made if isinstance(made, Sent) else Sent(made)
            blocks = sent.body if not isinstance(sent.body, dict | list | str) else json.dumps(sent.body).encode()
            self.send_response(sent.status)
            for name, value in {"connection": "close", **sent.headers}.items():
                self.send_header(name, value)
            if isinstance(blocks, bytes):
                self.send_header("content-length", str(len(blocks) + int(sent.headers.get("x-missing", 0))))
            self.end_headers()
            try:
                for block in [blocks] if isinstance(blocks, bytes) else blocks:
                    self.wfile.write(block)
                    self.wfile.flush()
            except OSError:  # the client has left
                pass
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield FakeServer(f"http://127.0.0.1:{server.server_port}/v1", seen)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
