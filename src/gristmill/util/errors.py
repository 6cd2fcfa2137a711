"""The two ways a command ends badly, told apart by the exit code they lead to."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """A mistake the user can correct; the command exits with code 2.

    The message has the form: what is wrong (values). what to do (a command). `fix` maps options
    to the values that would be right; the command line prints the command with them put in.
    """

    def __init__(self, message: str, fix: Mapping[str, object] | None = None) -> None:
        """Keep the message and the options that would mend it."""
        super().__init__(message)
        self.fix = dict(fix or {})


class MissingPackage(UserError):
    """An optional package is not installed; nothing is wrong with what it was to read."""


class RunError(RuntimeError):
    """A failure while running (disk, data, hardware); the command exits with code 1.

    The message has the same form as that of a `UserError`.
    """


class Interrupted(Exception):
    """A signal ended the command after it saved its work; the exit code is 128 + the signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        """Keep the signal and what to tell the user."""
        super().__init__(message)
        self.signal_number = signal_number
