"""Follows a job in a terminal: one bar, the step's name, the state at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from app.client import Client


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
