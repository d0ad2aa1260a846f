"""The one client of OpenAI-compatible servers: bounded, patient with what passes, and it sends its key nowhere else."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from queue import Empty, Queue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rlhf_lightning.errors import UserError, check_number, needs

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the key of a server, and the only place where one is looked for."""
LARGEST = 8 << 20
"""Bytes of an answer."""
LONGEST_WAIT = 120.0
"""Seconds that a server may ask to wait before the next try."""
PASSING = {408, 409, 429}
"""Statuses of failures that may pass, beside 5xx."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerError(UserError):
    """A request failed.

    Args:
        message: one line.
        passing: the same request may succeed later.
        wait: seconds until then, where the server says so.
        status: of HTTP, None where no answer came.
    """

    def __init__(
        self, message: str, passing: bool = False, wait: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.passing, self.wait, self.status = passing, wait, status


class Server:
    """An OpenAI-compatible server, such as vLLM, llama.cpp, Ollama or `transformers serve`.

    A redirect is refused: the key and the texts are for the host that the user named. Threads may share it.

    Args:
        base_url: up to `/v1`; the key, where one is needed, is read from the environment variable OPENAI_API_KEY.
        timeout: seconds for an answer.
        retries: of a request that failed with 429, 5xx, a time-out, no connection or half an answer.
        backoff: seconds before the first retry; twice as many before each further one, with jitter. `Retry-After` of
            the server comes first.
        key: of the configuration, for messages.

    Raises:
        UserError: a URL that is none of http or https, or the extra `judge` is not installed.
    """

    def __init__(
        self, base_url: str, *, timeout: float = 120, retries: int = 0, backoff: float = 0.5, key: str = "judge"
    ) -> None:
        address = urlsplit(str(base_url))
        if address.scheme not in ("http", "https") or not address.hostname or address.username:
            raise UserError(f"{key}.base_url={base_url} is not a URL such as http://127.0.0.1:8000/v1")
        check_number(f"{key}.timeout", timeout, "(0, inf)")
        check_number(f"{key}.retries", retries, "[0, inf)", whole=True)
        openai, httpx2 = needs("openai", "judge"), needs("httpx2", "judge")
        self.url, self.timeout, self.retries, self.backoff = str(base_url).rstrip("/"), timeout, retries, backoff
        self._openai, self._raw, self._closed = openai, httpx2.Response, threading.Event()
        self._secret = os.environ.get(KEY_VARIABLE, "")
        self._headers: dict[str, Any] = {"Accept-Encoding": "identity"}  # the limit counts what is decoded
        if not self._secret:
            self._headers["Authorization"] = openai.Omit()
        http = httpx2.Client(
            follow_redirects=False, timeout=timeout, event_hooks={"response": [self._limit]},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )  # fmt: skip
        self._client = openai.OpenAI(
            base_url=self.url, api_key=self._secret or "none", organization="", project="", max_retries=0,
            timeout=timeout, http_client=http,
        )  # fmt: skip

    def close(self) -> None:
        """Start no further try; requests that run in other threads end with their answer or time-out."""
        self._closed.set()
        self._client.close()

    def chat(self, **body: Any) -> dict[str, Any]:
        """Return the answer to a request for a chat completion, an object with `choices`.

        Raises:
            ServerError: there is none after all tries.
        """
        return self._patiently(lambda: self._once(self._request("/chat/completions", body), "choices"))

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the answer to a request for a completion of text or tokens, an object with `choices`.

        Raises:
            ServerError: there is none after all tries.
        """
        return self._patiently(lambda: self._once(self._request("/completions", body), "choices"))

    def post(self, path: str, retry: bool = True, **body: Any) -> None:
        """Send an object to another path of the server, above /v1 where the path begins with two slashes.

        Raises:
            ServerError: it was not taken.
        """
        self._patiently(lambda: self._text(self._request(path, body)), self.retries if retry else 0)

    def get(self, path: str) -> dict[str, Any]:
        """Return the object at a path of the server, see :meth:`post`.

        Raises:
            ServerError: there is none.
        """
        return self._patiently(lambda: self._object(self._request(path, None)))

    def _request(self, path: str, body: dict[str, Any] | None) -> Callable[[], Any]:
        """Return what sends one request, a GET without `body`."""
        root = self.url.removesuffix("/v1")
        url = root + path[1:] if path.startswith("//") else path
        options: Any = {"headers": self._headers}
        if body is None:
            return lambda: self._client.get(url, cast_to=self._raw, options=options)
        return lambda: self._client.post(url, cast_to=self._raw, body=body, options=options)

    def _patiently(self, call: Callable[[], Result], retries: int | None = None) -> Result:
        """Return the result of a call that is made again when it failed in a way that may pass."""
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                return call()
            except ServerError as error:
                if not error.passing or attempt == retries:
                    raise
                wait = self.backoff * 2**attempt * random.uniform(0.5, 1.0) if error.wait is None else error.wait
                if wait > LONGEST_WAIT:
                    raise ServerError(f"{error}; it asks to wait {wait:.0f} seconds") from None
                if self._closed.wait(wait):
                    raise
        raise AssertionError("unreachable")

    def models(self) -> list[str]:
        """Return the names of the server's models, none where it does not say."""
        try:
            listed = self._once(self._request("/models", None), "data")["data"]
            return [str(model["id"]) for model in listed]
        except (ServerError, KeyError, TypeError):
            return []

    def _text(self, call: Callable[[], Any]) -> str:
        """Return the text of one answer."""
        openai = self._openai
        try:
            return within(self.timeout, lambda: call().text)
        except openai.APIStatusError as error:
            raise self._refused(error.response) from None
        except (openai.APITimeoutError, TimeoutError):
            raise ServerError(f"{self.url} gave no answer in {self.timeout:g} seconds", passing=True) from None
        except openai.APIConnectionError as error:
            reason = self._clean(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise ServerError(f"{self.url} cannot be used: {reason}", passing=True) from None
        except (openai.OpenAIError, RuntimeError, ValueError) as error:  # it was closed, or is no text
            raise ServerError(f"{self.url} cannot be used: {self._clean(str(error))}") from None

    def _object(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Return the object of one answer."""
        text = self._text(call)
        try:
            answer = json.loads(self._redacted(text))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ServerError(
                f"{self.url} cannot be used: its answer is no JSON: {self._clean(text)[:80]!r}", passing=True
            )
        return answer

    def _once(self, call: Callable[[], Any], needed: str) -> dict[str, Any]:
        """Return the object of one answer, in which the list `needed` is there."""
        answer = self._object(call)
        if not isinstance(answer.get(needed), list):
            shown = self._clean(json.dumps(answer))[:80]
            raise ServerError(f"{self.url} cannot be used: its answer has no {needed}: {shown!r}", True)
        return answer

    def _refused(self, response: Any) -> ServerError:
        """Return what an answer with another status than 200 means."""
        status = int(response.status_code)
        if 300 <= status < 400:
            target = self._clean(response.headers.get("location", ""))[:200]
            return ServerError(
                f"{self.url} redirects to {target or 'nowhere'}, which is refused: give the URL of the server itself",
                status=status,
            )
        hint = f"; the key is read from {KEY_VARIABLE}" if status in (401, 403) else ""
        passing = status in PASSING or status >= 500
        reason = self._clean(response.text)[:200]
        message = f"{self.url} answered {status} {self._clean(response.reason_phrase)}: {reason}{hint}"
        return ServerError(message, passing, retry_after(response.headers.get("retry-after")), status)

    def _redacted(self, text: str) -> str:
        """Return a server's text without the key, which some repeat."""
        return text.replace(self._secret, f"${KEY_VARIABLE}") if len(self._secret) > 3 else text

    def _clean(self, text: str) -> str:
        """Return a server's text on one line, without the key and without control characters."""
        return "".join(c if c.isprintable() else " " for c in " ".join(self._redacted(text).split()))

    def _limit(self, response: Any) -> None:
        """Bound size and duration of an answer's body before it is read."""
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise ServerError(f"{self.url} cannot be used: its answer is compressed, which was not asked for")
        response.stream = limited(response.stream, self.url, self.timeout)


def answers_of(answer: Mapping[str, Any]) -> list[str]:
    """Return the texts of the choices of an answer, "" for one that has none.

    Raises:
        ServerError: a choice is no message.
    """
    try:
        contents = [choice["message"]["content"] for choice in answer["choices"]]
    except (KeyError, TypeError):
        raise ServerError("the server's answer has a choice without a message", passing=True) from None
    return [content if isinstance(content, str) else "" for content in contents]


def limited(stream: Any, url: str, timeout: float) -> Any:
    """Return a stream of httpx2 that ends with a ServerError when it is too long, or comes too slowly."""
    import httpx2

    class Limited(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            size, end = 0, time.monotonic() + timeout
            for block in stream:
                size += len(block)
                if size > LARGEST:
                    raise ServerError(f"{url} cannot be used: its answer has more than {LARGEST >> 20} MiB")
                if time.monotonic() > end:
                    raise ServerError(f"{url} gave no answer in {timeout:g} seconds", passing=True)
                yield block

        def close(self) -> None:
            stream.close()

    return Limited()


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what `call` returns, or raise a TimeoutError after so many seconds.

    A client's own time-outs are of each read, so headers that come byte by byte evade them. The thread of such a call
    is left to end with its connection.
    """
    done: Queue[tuple[Any, BaseException | None]] = Queue(1)

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a header `Retry-After` asks for, a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0) if float(value) == float(value) else None
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[tuple[int, Result | Exception]]:
    """Yield (place, result or exception) of a function of each item, called in so many threads at a time.

    Results wait for the caller, at most as many as there are threads; no further call begins until it takes one. When
    the caller stops, none begins at all, and nothing waits for those that run.
    """
    lock, ready = threading.Condition(), list[tuple[int, Any]]()
    todo, stopped = iter(enumerate(items)), threading.Event()

    def work() -> None:
        while True:
            with lock:
                lock.wait_for(lambda: stopped.is_set() or len(ready) < threads)
                place, item = (-1, None) if stopped.is_set() else next(todo, (-1, None))
            if place < 0:
                return
            try:
                result: Any = function(item)  # type: ignore[arg-type]
            except Exception as error:
                result = error
            with lock:
                ready.append((place, result))
                lock.notify_all()

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            with lock:
                lock.wait_for(lambda: ready)
                done = ready.pop(0)
                lock.notify_all()
            yield done
    finally:
        with lock:
            stopped.set()
            lock.notify_all()
