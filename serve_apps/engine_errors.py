"""Turns an engine's error answer into the one wire shape.

vLLM answers with `{"error": {...}}`, FastAPI with `{"detail": ...}`, Serve with plain text; a client sees none of these
differences. Status and message stay the engine's, `type` and `code` become OpenAI's words.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import ApiError

CODES = {400: "invalid_value", 404: "not_found", 413: "request_too_large", 422: "invalid_value", 501: "not_supported"}


def reshape(status: int, body: bytes) -> ApiError:
    """The ApiError for an engine's answer with this status (400 or above) and body."""
    message, param = _read(body)
    if status == 422:
        status = 400
    code = CODES.get(status, "engine_error")
    if "context length" in message or "maximum model length" in message or "max_model_len" in message:
        code = "context_length_exceeded"
    return ApiError(status, message or f"The engine answered with status {status}.", code, param=param)


def _read(body: bytes) -> tuple[str, str | None]:
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        return body[:500].decode("utf-8", "replace"), None
    if not isinstance(data, dict):
        return str(data)[:500], None
    error = data.get("error", data)
    if not isinstance(error, dict):
        return str(error)[:500], None
    message = error.get("message", error.get("detail", ""))
    if isinstance(message, list):  # FastAPI lists each field that does not fit
        message = "; ".join(_field(item) for item in message)
    param = error.get("param")
    return str(message or "")[:2000], param if isinstance(param, str) else None


def _field(item: Any) -> str:
    """One entry of FastAPI's `detail`: where, and what is wrong."""
    if not isinstance(item, dict):
        return str(item)
    where = item.get("loc")
    return f"{'.'.join(map(str, where if isinstance(where, list) else ()))}: {item.get('msg', '')}"
