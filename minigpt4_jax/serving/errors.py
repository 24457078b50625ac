"""Errors of single requests, each with the HTTP status and the fields of OpenAI's error object."""

from typing import Any

INVALID = "invalid_request_error"
SERVER = "server_error"


class RequestError(Exception):
    """A request that cannot be answered. The server itself goes on.

    Attributes:
        status: the HTTP status.
        message: what was wrong, and what was expected.
        code: a name for programs, such as "queue_full"; None if the type says enough.
        param: the field of the request that is wrong.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, INVALID if self.status < 500 else SERVER)

    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        error = {
            "message": self.message, "type": self.type, "param": self.param, "code": self.code,
        }  # fmt: skip
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request with a wrong value."""
    return RequestError(400, message, code, param=param)


def queue_full(waiting: int, retry_after: int) -> RequestError:
    """No more requests are accepted for now."""
    return RequestError(
        429, f"the queue is full ({waiting} waiting); try again in {retry_after} s", "queue_full",
        retry_after=retry_after,
    )  # fmt: skip


def timed_out(seconds: float) -> RequestError:
    """The time limit of a request has passed."""
    return RequestError(
        504, f"not answered within {seconds:.0f} s; ask for fewer tokens, or try again later",
        "timeout",
    )  # fmt: skip


def shutting_down() -> RequestError:
    """The server accepts no more requests."""
    return RequestError(503, "the server is shutting down", "shutting_down", retry_after=10)


def device_failure(reason: str) -> RequestError:
    """The device could not compute this request."""
    return RequestError(500, f"the request could not be computed: {reason}", "device_error")
