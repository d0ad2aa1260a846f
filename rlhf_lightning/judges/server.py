"""A judge behind an OpenAI-compatible server, by log-probabilities where the server gives them, else by its text."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.generation.server import Server, ServerError, answers_of, concurrently
from rlhf_lightning.judges.cache import cached
from rlhf_lightning.judges.language import LanguageJudge
from rlhf_lightning.judges.questions import Question, Reply
from rlhf_lightning.ops.seeding import derive_seed

log = logging.getLogger(__name__)

TOP = 20
"""Tokens of which a server gives log-probabilities, at most."""
SHORT = 8
"""Tokens of an answer of one letter or number, where a server gives no log-probabilities."""
IN_A_ROW = 20
"""Questions without an answer after which the server is taken to be gone."""
CONTROL = re.compile(
    r"<(?=[|｜]|/?s>|/?(?:start|end)_of_turn>|/?(?:bos|eos|pad)>|/?think>)|\[(?=/?INST\])", re.IGNORECASE
)
"""How control tokens of the usual chat templates begin. A server may take them for its own, so a space is put in."""


def server_judge(
    model: str,
    base_url: str,
    *,
    concurrency: int = 4,
    timeout: float = 60,
    retries: int = 5,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    price_per_million: Mapping[str, float] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    name: str | None = None,
    method: str = "logprobs",
    rubric: str | None = None,
    scale: int = 5,
    constitution: Any = None,
    samples: int = 1,
    on_failure: str = "skip",
) -> LanguageJudge:
    """Return a judge behind an OpenAI-compatible server; its key is read from OPENAI_API_KEY.

    Args:
        model: its name there.
        base_url: up to `/v1`.
        concurrency: requests at a time.
        timeout: seconds for an answer.
        retries: of a request that failed in a way that may pass.
        max_new_tokens, temperature: of written answers.
        cache: folder where replies are kept; None keeps none.
        Others: see :class:`LanguageJudge`.
    """
    if not model:
        raise UserError(f"judge=server needs judge.model=<the model's name at {base_url}>")
    answers = ServerModel(
        Server(base_url, timeout=timeout, retries=retries),
        str(model),
        concurrency=concurrency,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return LanguageJudge(
        cached(answers, cache), name=name, method=method, rubric=rubric, scale=scale, constitution=constitution,
        samples=samples, temperature=temperature, on_failure=on_failure, price_per_million=price_per_million, seed=seed,
    )  # fmt: skip


class ServerModel:
    """Answers questions by requests to a server, several at a time.

    Args:
        server: where it runs.
        model: its name there.
        Others: see :func:`server_judge`.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        *,
        concurrency: int = 4,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_number("judge.concurrency", concurrency, "[1, 256]", whole=True)
        check_number("judge.max_new_tokens", max_new_tokens, "[1, inf)", whole=True)
        check_number("judge.temperature", temperature, "[0, inf)")
        self.server, self.name, self.concurrency = server, model, concurrency
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature} | (
            {"seed": seed} if temperature else {}
        )
        self.identity = {"base_url": server.url, "model": model, "written": sampling}
        self.logprobs, self._mutex = True, threading.Lock()

    def close(self) -> None:
        """Start no further request."""
        self.server.close()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, see :meth:`Model.ask`.

        Raises:
            UserError: every question would fail: the key or the model is refused, the server redirects, was not there
                at the first request, or does not answer any more.
        """
        failed, answered = 0, False
        for place, reply in concurrently(self._reply, questions, self.concurrency):
            if not isinstance(reply, Exception):
                failed, answered = 0, True
                yield place, reply
                continue
            if not isinstance(reply, ServerError):
                raise reply
            self._stop_if_hopeless(reply, answered)
            failed += 1
            if failed >= IN_A_ROW:
                raise UserError(f"{IN_A_ROW} questions in a row had no answer, the last because {reply}") from reply
            yield place, Reply(failure=str(reply))

    def _stop_if_hopeless(self, error: ServerError, answered: bool) -> None:
        status = error.status
        if status in (404, 400, 422) and not answered:
            names = self.server.models()
            if names and self.name not in names:
                listed = f"the server has {', '.join(names[:10])}.{nearest(self.name, names)}"
                raise UserError(f"judge.model={self.name} is not there: {listed}") from error
        gone = status is None and error.passing and not answered
        if gone or (status is not None and (status in (401, 403, 404) or 300 <= status < 400)):
            raise error

    def _reply(self, question: Question) -> Reply:
        began = time.perf_counter()
        messages = [{"role": "user", "content": CONTROL.sub(lambda found: f"{found[0]} ", question.text)}]
        body: dict[str, Any] = {"model": self.name, "messages": messages}
        answer = None
        if question.options and self.logprobs:
            try:
                answer = self.server.chat(**body, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=TOP)
            except ServerError as error:
                if error.status not in (400, 422):
                    raise
                self._without_logprobs(f"it refuses to ({error.status})")
        if answer is not None and (shares := option_shares(answer, question.options)) is not None:
            return self._made(answer, None, shares, began)
        if answer is not None:
            self._without_logprobs("its answers have none")
        if question.options:
            body |= {"max_tokens": SHORT, "temperature": 0.0}
        else:
            body |= {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
            if self.temperature:
                body["seed"] = derive_seed(self.seed, question.text, question.sample) % 2**31
        answer = self.server.chat(**body)
        return self._made(answer, self._text(answer), None, began)

    def _text(self, answer: Mapping[str, Any]) -> str:
        texts = answers_of(answer)
        if not texts:
            raise ServerError(f"{self.server.url} returned no answer")
        return texts[0]

    def _made(self, answer: Any, text: str | None, shares: tuple[float, ...] | None, began: float) -> Reply:
        read, written = (token_count(answer, name) for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text, shares, None, read, written, time.perf_counter() - began)

    def _without_logprobs(self, reason: str) -> None:
        with self._mutex:
            if self.logprobs:
                log.warning("%s gives no log-probabilities (%s): verdicts are read from text", self.server.url, reason)
            self.logprobs = False


def option_shares(answer: Mapping[str, Any], options: Sequence[str]) -> tuple[float, ...] | None:
    """Return the probability of each option as the first token of an answer; None where the answer has none.

    An option that is not among the tokens that a server lists counts as 0.
    """
    try:
        listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        shares = [(str(entry["token"]).strip(), math.exp(min(float(entry["logprob"]), 0.0))) for entry in listed]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return tuple(sum(share for token, share in shares if token == option) for option in options) if shares else None


def token_count(answer: Mapping[str, Any], name: str) -> int:
    """Return a number of the answer's usage, 0 where it is not there."""
    usage = answer.get("usage")
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if type(value) is int and value >= 0 else 0
