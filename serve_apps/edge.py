"""What stands before every HTTP server of Serve, replicas and the fallback proxy alike: `/-/routes` is not answered.

Serve tells there, to everyone who reaches the port, which applications and so which models there are. HAProxy refuses the path
to the world (`cluster.haproxy`); this does so to a node's network. Serve calls `middlewares` by the name in
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`, which `cluster.session` sets.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware

from cluster.errors import ApiError
from serve_apps.wire import send_error

CLOSED = "/-/routes"


class Closed:
    """Pure-ASGI middleware; a request for another path costs one comparison."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # The path begins with the root path, whatever that is.
        if scope["type"] == "http" and scope["path"].endswith(CLOSED):
            await send_error(send, ApiError(404, "There is nothing at this path.", "not_found"))
        else:
            await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(Closed)]
