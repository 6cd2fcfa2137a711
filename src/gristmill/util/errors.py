"""The two ways a command ends badly, told apart by the exit code they lead to."""


class UserError(ValueError):
    """A mistake the user can correct; the command exits with code 2.

    The message has the form: what is wrong (values). what to do (a command).
    """


class RunError(RuntimeError):
    """A failure while running (disk, data, hardware); the command exits with code 1.

    The message has the same form as that of a `UserError`.
    """
