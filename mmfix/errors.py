"""Typed errors. Every message is one line that says what is wrong, where, and what to do."""


class MmfixError(Exception):
    """Base of all errors that mmfix raises on purpose."""


class UnsupportedModel(MmfixError):  # noqa: N818 - a public name
    """The engine cannot find a fact it needs about this model; the message names the fact."""


class MethodError(MmfixError):
    """Unknown method, unknown parameter, or a value out of its range."""


class ConflictError(MmfixError):
    """Two methods, or two mitigations, that cannot act on one model together."""


class RestoreError(MmfixError):
    """Something that mmfix changed was not put back on exit."""


class ImageError(MmfixError):
    """A picture that cannot be used."""


class DataError(MmfixError):
    """An input file that cannot be used; the message names the line where there is one."""


class UsageError(MmfixError):
    """A call that cannot be meant as it was written."""


class MmfixWarning(UserWarning):
    """Something the user should know that does not stop the work."""
