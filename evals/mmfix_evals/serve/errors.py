"""Errors of the server in the form that OpenAI clients read."""

from __future__ import annotations

from typing import Any

from mmfix_evals.errors import EvalError


class ApiError(EvalError):
    """A request that is answered with an error object.

    Args:
        status: HTTP status.
        message: one line: what, where, what to do.
        code: short name of the error, for programs and for the error counter.
        param: the field of the request that is at fault.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """The error's type in OpenAI's vocabulary."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        found: dict[str, str] = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def invalid(param: str, message: str) -> ApiError:
    """A field that cannot be used as it is."""
    return ApiError(400, f"{param}: {message}", "invalid_value", param=param)


def from_exception(error: BaseException) -> ApiError:
    """What a client is told of an exception raised while generating.

    The project's own errors of wrong use are meant for the caller. Anything else may hold paths or internals and is
    only named by its type.
    """
    if isinstance(error, ApiError):
        return error
    from mmfix import errors as engine
    from mmfix_decoding.conversation import PromptTooLong

    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded", param="messages")
    if isinstance(error, engine.ImageError):
        return ApiError(400, str(error), "invalid_image", param="messages")
    if isinstance(error, (engine.UsageError, engine.MethodError, engine.ConflictError)):
        return ApiError(400, str(error), "invalid_request")
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "the device ran out of memory; send fewer or smaller images", "out_of_memory")
    return ApiError(
        500, f"generation failed with {type(error).__name__}; the server's log has the details", "internal_error"
    )
