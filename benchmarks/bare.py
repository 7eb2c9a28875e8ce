"""What Tersor is measured against: the least that an ASGI server can do for the same request."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def write_body(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Writes the body to a file as it comes, and answers 201."""
    if scope["type"] != "http":
        return
    if scope["method"] == "POST":
        with open(os.environ["BENCH_BARE_FILE"], "wb") as file:  # noqa: ASYNC230 - bare on purpose
            more = True
            while more:
                message = await receive()
                file.write(message.get("body", b""))
                more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


app = FastAPI()


@app.get("/job")
def job() -> dict[str, Any]:
    """A job's worth of JSON out of a bare FastAPI route."""
    return {
        "id": "job_00000000000000000000000000",
        "state": "running",
        "progress": 0.5,
        "step": "finetune",
        "attempt": 1,
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": None,
        "eta_seconds": 12.0,
        "queue_position": None,
        "error": None,
        "goal_met": None,
    }
