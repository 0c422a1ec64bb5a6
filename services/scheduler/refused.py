"""The one way in which a command is turned down."""

from __future__ import annotations


class Refused(Exception):
    """The command cannot be done; the code and the words go back to whoever sent it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
