"""What stands between the network and the labeling page: host, origin, size, headers, tokens."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 1 << 20
"""Bytes of a request."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that answers only what this page itself sends, from this machine.

    A host that is not loopback is refused, against DNS rebinding; so is a request that changes something without the
    page's own origin, and a body of more than `LARGEST_BODY` bytes. Any port will do: that of an SSH tunnel is
    another one than the server's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        if (problem := refusal(scope["method"], headers)) is not None:
            await JSONResponse({"error": problem[1]}, problem[0])(scope, receive, sent)
            return
        body = await read_body(receive)
        if body is None:
            await JSONResponse({"error": f"a request has at most {LARGEST_BODY} bytes"}, 413)(scope, receive, sent)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            message = next(messages, None)
            return await receive() if message is None else message

        await self.app(scope, replay, sent)


def refusal(method: str, headers: Headers) -> tuple[int, str] | None:
    """Return the status and the reason with which a request is refused, None where it is not."""
    host = headers.get("host", "")
    if hostname(host) not in LOOPBACK or len(headers.getlist("host")) != 1:
        return 421, "this page answers on 127.0.0.1 only"
    if method not in ("GET", "HEAD", "POST"):
        return 405, f"{method} is not used here"
    if method == "POST":
        origin = urlsplit(headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != host:
            return 403, "a request of another site"
        if headers.get("content-type", "").partition(";")[0] != "application/json":
            return 415, "requests are JSON"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and method == "POST":
        return 403, "a request of another site"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST_BODY:
        return 413, f"a request has at most {LARGEST_BODY} bytes"
    return None


def hostname(host: str) -> str | None:
    """Return the name in a Host header without its port, None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


async def read_body(receive: Receive) -> bytes | None:
    """Return the body of a request, None where it is too large or the sender has gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


class Links:
    """The tokens of a start: one in every personal link, and what a browser gets in exchange for it.

    A token travels in the fragment of the link, which browsers do not send, and once in the body of a request. The
    browser then has a cookie, and every tab a token of its own; only the tab that was opened last may change
    something.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._tokens = {name: secrets.token_urlsafe(24) for name in names}
        self._cookies = {name: secrets.token_urlsafe(24) for name in self._tokens}
        self._tabs: dict[str, list[str]] = {name: [] for name in self._tokens}

    def token(self, name: str) -> str:
        """Return the token of the link of `name`."""
        return self._tokens[name]

    def open(self, name: str, token: Any, cookie: str | None) -> tuple[str, str] | None:
        """Return the cookie and a new tab's token for whoever has the link or the cookie, else None."""
        if name not in self._tokens:
            return None
        if not (same(token, self._tokens[name]) or same(cookie, self._cookies[name])):
            return None
        tab = secrets.token_urlsafe(24)
        self._tabs[name].append(tab)
        return self._cookies[name], tab

    def state(self, name: str, cookie: str | None, tab: str | None) -> str:
        """Return "open", "stale" for a tab that another one has taken over from, or "unknown"."""
        if name not in self._tokens or not same(cookie, self._cookies[name]):
            return "unknown"
        tabs = self._tabs[name]
        if tabs and same(tab, tabs[-1]):
            return "open"
        return "stale" if any(same(tab, other) for other in tabs) else "unknown"


def same(given: Any, secret: str) -> bool:
    """Return whether a text is the secret, in a time that does not tell where they differ."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="replace"), secret.encode())
