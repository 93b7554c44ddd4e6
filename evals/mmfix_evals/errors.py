"""Errors of the evaluation package: one clear line each, saying what, where and what to do.

They import nothing, so that scoring needs neither torch nor `mmfix`; the command line maps them to exit codes.
"""

LONGEST = 2000


class EvalError(Exception):
    """Base of the errors below; `str(error)` is one line for the user, however long the value that it shows."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"


class DataError(EvalError):
    """An input file or record is missing, malformed or inconsistent; names the file and, where known, the line."""


class UsageError(EvalError):
    """A wrong name or option; lists the choices."""


class MissingDependency(EvalError):  # noqa: N818  (part of the package's agreed names)
    """An optional package is not installed; names the pip line."""
