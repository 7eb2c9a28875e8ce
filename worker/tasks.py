"""What a message does: it wakes a slot. Claiming, running and finishing are the database's and the supervisor's."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from app.contract.queue import TASK


def register(app: Celery, wake: Callable[[str], None]) -> None:
    """Adds the one task. It returns at once; how much runs is the dispatcher's business."""

    def run(work_id: str) -> None:
        wake(work_id)

    app.task(name=TASK, ignore_result=True)(run)
