"""Serving the labeling page on loopback, from a command or a notebook."""

from __future__ import annotations

import errno
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

import uvicorn

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.labeling.app import OVERVIEW, application
from rlhf_lightning.feedback.labeling.security import Links
from rlhf_lightning.feedback.labeling.service import Labeling

HOST, FIRST_PORT, PORTS_TRIED = "127.0.0.1", 8765, 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
STOP_SECONDS = 3


def annotator_names(given: int | str | Sequence[str]) -> list[str]:
    """Return the names of annotators, from a number of them or from a list.

    Raises:
        UserError: none, two of one name, or a name that cannot be part of a link.
    """
    if isinstance(given, int | float) or given is None or isinstance(given, Mapping):
        if type(given) is not int or not 1 <= given <= 1000:
            raise UserError(f"label.annotators={given} is neither a number from 1 to 1000 nor a list of names")
        return [f"annotator-{number}" for number in range(1, given + 1)]
    names = [str(name) for name in ([given] if isinstance(given, str) else given)]
    for name in names:
        if name == OVERVIEW:
            raise UserError(f"label.annotators: {name!r} is the link of whoever runs it; give another name")
        if not NAME.fullmatch(name):
            raise UserError(
                f"label.annotators: {name!r} cannot be part of a link; a name is a letter or digit and at most 39 more "
                "of a-z, A-Z, 0-9 and . _ -"
            )
    if not names or len(set(names)) < len(names):
        raise UserError(f"label.annotators={names} has {'a name twice' if names else 'no name'}")
    return names


def listen(port: int | None) -> socket.socket:
    """Return a socket on loopback: on `port`, or with None on the first free one from 8765 on.

    Raises:
        UserError: the port is in use, with the next free one.
    """
    if port is not None:
        check_number("label.port", port, "[1, 65535]", whole=True)
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else (port,):
        try:
            return _bound(candidate)
        except OSError as error:
            if error.errno == errno.EACCES:
                raise UserError(f"label.port={candidate} may not be opened; ports from 1024 on may") from error
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"label.port={candidate} cannot be opened: {error.strerror}") from error
    if port is None:
        raise UserError(f"the ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1} are in use; give label.port=<port>")
    for other in range(port + 1, 65536):
        try:
            _bound(other).close()
        except OSError:
            continue
        raise UserError(f"label.port={port} is in use; {other} is free")
    raise UserError(f"label.port={port} is in use; give another one")


def _bound(port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections are just ending
        opened.bind((HOST, port))
        opened.listen(128)
    except OSError:
        opened.close()
        raise
    return opened


class Server:
    """The labeling page, served by a thread of this process until :meth:`stop`.

    ::

        with Server(labeling) as server:
            print(server.links, server.overview)
            input("Enter ends it. ")

    Args:
        labeling: what is served.
        port: None is the first free one from 8765 on.
    """

    def __init__(self, labeling: Labeling, port: int | None = None) -> None:
        self.labeling = labeling
        self._links = Links([*labeling.annotators, OVERVIEW])
        self._socket = listen(port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            application(labeling, self._links),
            access_log=False,
            log_config=None,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="labeling", daemon=True)
        self._thread.start()

    @property
    def links(self) -> dict[str, str]:
        """The personal link of every annotator."""
        return {name: self._link(name) for name in self.labeling.annotators}

    @property
    def overview(self) -> str:
        """The link of the overview."""
        return self._link(OVERVIEW)

    def _link(self, name: str) -> str:
        return f"http://{HOST}:{self.port}/a/{name}#{self._links.token(name)}"

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the server has ended, and return whether it is still running."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def stop(self) -> None:
        """End: a model's answer that is not there yet is given up; what is confirmed is on disk already."""
        self.labeling.close()
        self._server.should_exit = True
        self._thread.join(2 * STOP_SECONDS)
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
