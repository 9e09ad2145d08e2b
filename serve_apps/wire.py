"""What goes over the wire between client, gateway and engine: header names, and how an error is sent.

Both `engine.py` and `gateway.py` use it; it imports neither Ray nor vLLM.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import ApiError

SECRET_HEADER = b"x-tidepool-secret"
USAGE_HEADER = b"x-tidepool-usage"
QUEUED_HEADER = b"x-tidepool-queued"
USAGE_COMMENT = b": tidepool-usage "
USAGE_PATH = "/-/tidepool/usage/"


async def send_error(send: Any, error: ApiError, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send an ApiError as a whole ASGI response in the one wire shape."""
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": [*headers, *(extra or [])]})
    await send({"type": "http.response.body", "body": body})
