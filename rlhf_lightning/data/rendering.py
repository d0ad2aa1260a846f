"""Chat templates are programs of whoever made the model folder: they run in a process of their own, within bounds.

Hugging Face's sandbox keeps a template from Python; it bounds neither its time nor its memory. The process is a fork
that stays for the next rendering and ends when nothing was rendered for a moment: a rendering costs one message.
"""

from __future__ import annotations

import gc
import os
import signal
import warnings
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from rlhf_lightning.errors import UserError

CPU_SECONDS = 2.0
WALL_SECONDS = 60.0  # what a process that cannot compute (swapped out, stopped) may take
MEMORY = 1 << 30  # bytes beyond those of this process
CHARACTERS = 100_000  # written by the template itself; of the messages every character may come four times
IDLE_SECONDS = 2.0


class TemplateError(ValueError):
    """What a chat template says to a conversation that it refuses, or the mistake in the template."""


class Renderer:
    """Renders conversations with a chat template of a tokenizer as `apply_chat_template` does, within bounds.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: the chat template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.process: tuple[int, int, Connection] | None = None  # the process that forked, its child, the way to it

    def __call__(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the text of a conversation; `options` are those of `apply_chat_template`.

        Raises:
            TemplateError: the template refuses the conversation, or is wrong.
            UserError: the template exceeds a bound.
        """
        limit = CHARACTERS + 4 * len(repr((messages, options)))
        if _is_worker:
            return self._read(self._timed(messages, options, limit), messages)
        for last_try in (False, True):
            connection = self._connection()
            try:
                connection.send((messages, options, limit))
                if not connection.poll(WALL_SECONDS):
                    self._end(kill=True)
                    raise self._exceeded(f"{WALL_SECONDS:.0f} s", messages)
                return self._read(connection.recv_bytes(), messages)
            except (EOFError, ConnectionError):
                status = self._end()
                if status or last_try:  # else it was idle, and has just ended
                    stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
                    bound = f"{CPU_SECONDS:.0f} s" if stopped else f"{MEMORY >> 20} MiB"
                    raise self._exceeded(bound, messages) from None
        raise AssertionError  # the second try returns or raises

    def _read(self, answer: bytes, messages: list[dict[str, Any]]) -> str:
        kind, text = answer[:1], answer[1:].decode(errors="surrogatepass")
        if kind == b"=":
            return text
        raise TemplateError(text) if kind == b"!" else self._exceeded(text, messages)

    def _exceeded(self, bound: str, messages: list[dict[str, Any]]) -> UserError:
        return UserError(
            f"the chat template of {self.tokenizer.name_or_path} takes more than {bound} for a conversation of "
            f"{len(messages)} messages; choose another with data.template"
        )

    def _connection(self) -> Connection:
        if self.process is None or self.process[0] != os.getpid():  # a fork of ours has the way of its parent
            ours, theirs = Pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other threads' locks are not needed for Jinja
                child = os.fork()
            if child == 0:
                ours.close()
                self._serve(theirs)
            theirs.close()
            self.process = (os.getpid(), child, ours)
            self._finalizer = weakref.finalize(self, end, *self.process, kill=True)
            self._finalizer.atexit = False  # the way to it is closed then
        return self.process[2]

    def _end(self, kill: bool = False) -> int:
        """Forget the process, and return how it ended."""
        assert self.process is not None
        process, self.process = self.process, None
        self._finalizer.detach()
        return end(*process, kill=kill) or 0

    def _serve(self, connection: Connection) -> NoReturn:
        """Answer what the parent sends; runs in the fork."""
        try:
            gc.disable()  # a collection would copy the memory of every module
            for number in (signal.SIGTERM, signal.SIGPROF):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
            limit_memory(MEMORY)
            patience = WALL_SECONDS  # the parent sends its first conversation as soon as it can
            while connection.poll(patience):
                messages, options, limit = connection.recv()
                connection.send_bytes(self._timed(messages, options, limit))
                patience = IDLE_SECONDS
        except (EOFError, OSError):  # the parent has ended
            pass
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _timed(self, messages: list[dict[str, Any]], options: dict[str, Any], limit: int) -> bytes:
        """Answer; the kernel ends this process when that takes too long."""
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = self._answer(messages, options, limit)
        signal.setitimer(signal.ITIMER_PROF, 0)
        return answer

    def _answer(self, messages: list[dict[str, Any]], options: dict[str, Any], limit: int) -> bytes:
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=self.source, tokenize=False, **options)
        except MemoryError:
            return f"-{MEMORY >> 20} MiB".encode()
        except Exception as error:  # jinja raises whatever the template's author chose
            return b"!" + (str(error) or type(error).__name__)[:1000].encode(errors="surrogatepass")
        if len(text) > limit:
            return f"-{limit} characters".encode()
        return b"=" + text.encode(errors="surrogatepass")


def end(owner: int, child: int, connection: Connection, kill: bool = False) -> int | None:
    """Close the way to a renderer's process and return how it ended; a fork of its owner only closes its own copy."""
    connection.close()
    if owner != os.getpid():
        return None
    with suppress(ProcessLookupError, ChildProcessError):  # somebody else has waited for it
        if kill:
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    return None


_is_worker = False


def become_worker() -> None:
    """Let templates run in this process, which somebody else watches: it ends when one exceeds a bound.

    A rendering takes a third of the time that it takes in another process.
    """
    global _is_worker
    _is_worker = True
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_memory(4 * MEMORY)  # it does other work besides


def limit_memory(more: int) -> None:
    """Let this process have `more` bytes of address space beyond what it has now; only where /proc tells."""
    import resource

    sizes = Path("/proc/self/statm")
    if sizes.exists():
        limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + more
        allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
