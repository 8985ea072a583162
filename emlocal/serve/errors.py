"""Errors for clients, with the HTTP status, in the form of OpenAI's API."""

from dataclasses import dataclass, field
from typing import Any

from emlocal.errors import BackendError, ContextFullError, EmlocalError, ModelError, UsageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818
    """Raised to answer a request with an error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    """The wrong field of the request, if it is known."""
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Returns the error in the form of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class ClosingError(EmlocalError):
    """An error because the server is closing."""

    def __init__(self) -> None:
        super().__init__("the server is closing and takes no more requests", "try again later")


def refusal_of(error: EmlocalError) -> Refusal:
    """Returns the answer to a client for an error of emlocal."""
    said = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, ContextFullError):
        return Refusal(400, said, "context_length_exceeded", "messages")
    if isinstance(error, ClosingError):
        return Refusal(503, said, "closing", headers={"retry-after": "10"})
    if isinstance(error, UsageError):
        return Refusal(400, said, "invalid_value")
    # The same request would fail again, and OpenAI's client tries each 5xx twice.
    code = "engine_error" if isinstance(error, BackendError | ModelError) else "server_error"
    return Refusal(500, said, code, headers={"x-should-retry": "false"})
