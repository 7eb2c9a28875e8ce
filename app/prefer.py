"""`Prefer: wait=N` (RFC 7240): an answer is held until something happens, without a thread or a connection held."""

from __future__ import annotations

import re
from collections.abc import Callable

import anyio
from fastapi import Request

from app.services import in_thread, services_of

MAX_WAIT_SECONDS = 60  # proxies commonly end a silent request after this long
# A short first pause answers quick changes at once; the longest one bounds what thousands who wait cost the database.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, PAUSE_GROWTH = 0.03, 0.5, 1.5

_WAIT = re.compile(r'(?:^|[,;])\s*wait\s*=\s*"?(\d{1,9})"?\s*(?=$|[,;])', re.IGNORECASE)


def preferred_wait(request: Request) -> int | None:
    """Seconds that the client is ready to wait, at most MAX_WAIT_SECONDS; None where it does not say or says 0."""
    found = _WAIT.search(",".join(request.headers.getlist("prefer")))
    return (min(int(found.group(1)), MAX_WAIT_SECONDS) or None) if found else None


def applied(seconds: int | None) -> dict[str, str]:
    """The header that says that the preference was honoured."""
    return {} if seconds is None else {"Preference-Applied": f"wait={seconds}"}


async def hold(request: Request, seconds: int, happened: Callable[[], bool]) -> None:
    """Returns when it has happened, the time is over, the client is gone, or the service ends.

    `happened` asks the database and runs in a thread, briefly.
    """
    services = services_of(request)
    deadline, pause = anyio.current_time() + seconds, FIRST_PAUSE_SECONDS
    while not await in_thread(happened):
        left = deadline - anyio.current_time()
        if left <= 0 or services.closing or await request.is_disconnected():
            return
        await anyio.sleep(min(pause, left))
        pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_SECONDS)
