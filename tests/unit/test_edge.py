"""Serve's list of routes is closed at every server of Serve, and nothing else is touched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve_apps import edge


def answered(path: str, kind: str = "http") -> list[dict[str, Any]]:
    """What is sent for a request to an app that answers everything with its path."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "app", "path": scope["path"]})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(edge.Closed(app)({"type": kind, "path": path}, None, send))
    return sent


@pytest.mark.parametrize("path", ["/-/routes", "/root/-/routes"])
def test_the_list_of_routes_is_not_there(path: str) -> None:
    start, body = answered(path)
    assert start["status"] == 404 and json.loads(body["body"])["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/-/healthz", "/v1/models", "/engines/a/v1/chat/completions", "/-/routes/x", ""])
def test_everything_else_goes_on(path: str) -> None:
    assert answered(path) == [{"type": "app", "path": path}]
    assert answered(path, "lifespan") == [{"type": "app", "path": path}]
