"""What an annotator is told when a request is not carried out."""

from __future__ import annotations


class Refused(Exception):
    """A request that is not carried out: the message for the annotator, and a name for the page."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
