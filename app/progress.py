"""Progress in a terminal: of an upload, and of a job, whose bar also names its step and its state at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from app.client import Client
from app.client.sending import OnProgress


@contextmanager
def sending(name: str, console: Console) -> Iterator[OnProgress]:
    """Draws what it is told; nothing for a file that is sent in one go."""
    # The name of a file may look like markup, or like a format.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=40),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, visible=False)
        yield lambda sent, size: progress.update(bar, completed=sent, total=size, visible=True)


def follow(client: Client, job_id: str, console: Console) -> dict[str, Any]:
    """Waits for the end of a job while drawing its progress; returns the finished job."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=40),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("queued", total=1.0)

        def draw(job: dict[str, Any]) -> None:
            running = job["state"] == "running"
            progress.update(
                bar, completed=job["progress"], description=(job["step"] or "running") if running else job["state"]
            )

        return client.wait(job_id, on_change=draw)
