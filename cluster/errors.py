"""The errors of Tidepool, one tree and one wire shape.

    TidepoolError                a user's or an operator's mistake, or a limit; never a bug of ours
    ├── ConfigError              a configuration file says something that is not allowed
    ├── LaunchError              `up` or `down` cannot do what was asked (busy port, too little memory, ...)
    ├── StoreError               the store refuses: unknown key id, bad value
    ├── DataError                rows or files that training cannot use; names file, line and what is wrong
    ├── TrainError               a training run cannot start or go on (batch arithmetic, memory, a loss that is no number)
    └── ApiError                 an answer to an HTTP client; carries status and OpenAI's error fields

Commands print a TidepoolError as one line and exit 2. HTTP layers send an ApiError as
`{"error": {"message", "type", "param", "code"}}` and nothing else, whatever the status.
"""

from __future__ import annotations

import json


class TidepoolError(Exception):
    """Base of the tree: its text is written for the person who reads it."""


class ConfigError(TidepoolError):
    """A configuration is not valid; one line per mistake, each with its path."""


class LaunchError(TidepoolError):
    """The cluster cannot be started, stopped or reached as asked."""


class StoreError(TidepoolError):
    """The store cannot do what was asked."""


class DataError(TidepoolError):
    """Data cannot be read, or a row is not what it should be: file, line, what to do."""


class TrainError(TidepoolError):
    """A training run, a search or an export cannot do what was asked; the last good checkpoint is whole."""


class ApiError(TidepoolError):
    """An HTTP answer that is an error.

    Args:
        status: HTTP status, 4xx for the client's mistakes, 5xx for ours.
        message: What is wrong and what to do, for a person.
        code: OpenAI's machine-readable code, such as `model_not_found`.
        param: The field at fault, if one is.
        retry_after: Seconds after which the same request may succeed; sent as `Retry-After`, rounded up.
        headers: More response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, -int(-retry_after // 1)))

    def body(self) -> bytes:
        """The one wire shape, as JSON bytes."""
        return error_body(self.message, error_type(self.status), self.code, self.param)


def error_type(status: int) -> str:
    """OpenAI's `type` for an HTTP status."""
    named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """`{"error": {...}}` as JSON bytes."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, for the line of ours: without line ends, at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
