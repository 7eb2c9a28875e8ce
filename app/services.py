"""What the endpoints work with: one object an application, opened and closed with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import Request

from app.contract.blobs import Blobs
from app.contract.blobs.digest import RecentDigests
from app.contract.queue import Doorbell
from app.contract.store import JobStore
from app.metrics import Metrics
from app.settings import Settings

Result = TypeVar("Result")

# With the broker down each ring blocks for seconds: it may hold this many threads, and no request waits for it.
RINGING_THREADS = 2
# To verify a large upload may take a minute after a restart: it must not take the threads of all other requests.
COMPLETING_THREADS = 4
# How long the end of the service waits for the last rings; the sweep makes up for those that it cuts off.
LAST_RINGS_SECONDS = 2.0
# Beyond this many waiting rings new ones are dropped; the sweep rings for whatever was not heard.
MAX_RINGING = 1000


@dataclass
class Services:
    """Store, blobs, doorbell, metrics and the hashes of unfinished uploads of one application."""

    settings: Settings
    store: JobStore
    blobs: Blobs
    doorbell: Doorbell
    metrics: Metrics
    closing: bool = False
    digests: RecentDigests = field(default_factory=RecentDigests)
    completing: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(COMPLETING_THREADS))
    _ringing: set[asyncio.Task[None]] = field(default_factory=set)
    _limit: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(RINGING_THREADS))

    def ring(self, work_id: str) -> None:
        """Tells the workers, after the commit and behind the request's back."""
        if len(self._ringing) < MAX_RINGING:
            task = asyncio.create_task(self._ring(work_id))
            self._ringing.add(task)
            task.add_done_callback(self._ringing.discard)

    async def _ring(self, work_id: str) -> None:
        await anyio.to_thread.run_sync(self.doorbell.ring, work_id, limiter=self._limit)

    async def close(self) -> None:
        """Lets the last rings out, then closes every connection."""
        self.closing = True
        if self._ringing:
            _, late = await asyncio.wait(self._ringing, timeout=LAST_RINGS_SECONDS)
            for task in late:
                task.cancel()
        self.doorbell.close()
        self.store.close()


def services_of(request: Request) -> Services:
    """The services of the application that handles this request."""
    found: Services = request.app.state.services
    return found


async def in_thread(call: Callable[..., Result], *arguments: object) -> Result:
    """Runs a blocking call (the store's are) in a thread of the pool."""
    return await anyio.to_thread.run_sync(call, *arguments)
