"""Around every request: its id, its metrics, its log line, and an answer where an endpoint broke. Plain ASGI."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import internal_error
from app.metrics import Metrics

log = logging.getLogger("tersor.http")

# What a caller's id may hold: nothing that could forge a log line.
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_request_id: ContextVar[str] = ContextVar("request_id", default="-")
# Methods beyond these share one label, so that a client cannot make time series.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestIds(logging.Filter):
    """Gives every log record the id of the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds `request_id`; every record passes."""
        record.request_id = _request_id.get()
        return True


class RequestContext:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or secrets.token_hex(8)
        _request_id.set(request_id)
        extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        started, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            log.exception("%s %s broke", scope["method"], scope["path"])
            if status:  # too late for another answer: the server closes the connection
                raise
            await internal_error()(scope, receive, send_on)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.latency.labels(method, route).observe(seconds)
        # Polling would drown everything else.
        level = logging.DEBUG if method == "GET" and status < 400 else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s %r %d %.1f ms", method, scope["path"], status, 1e3 * seconds)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            return text if _SAFE_ID.fullmatch(text) else None
    return None
