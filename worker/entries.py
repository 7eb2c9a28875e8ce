"""The two things that a child process does: run a job, inspect an upload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contract.records import UploadKind
from worker.child import Report
from worker.messages import Inspected, JobDone, Output, SeatDone
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks
from worker.request import RunRequest


@dataclass(frozen=True)
class InspectRequest:
    """One attempt at an inspection; `path` can be read only, `scratch` can be written to."""

    kind: UploadKind
    path: Path
    filename: str
    spec: dict[str, Any]
    scratch: Path


def job(request: RunRequest, progress: Report) -> JobDone | SeatDone:
    """Optimizes a model, or does one host's part in that."""
    from worker.ranks.crew import crew
    from worker.run import follow, run_job

    def others(ranks: Ranks) -> None:
        follow(request, ranks)

    with crew(_place(request), others, progress.problem) as ranks:
        if request.host:
            follow(request, ranks)
            return SeatDone()
        result = run_job(request, progress, progress.checkpoint, ranks)
    outputs = tuple(
        Output(path=str(file.path), name=file.name, format=file.format, media_type=file.media_type)
        for file in result.artifacts
    )
    return JobDone(report=result.report, artifacts=outputs)


def _place(request: RunRequest) -> Place:
    from worker.ranks.meeting import Place

    spec = request.spec
    if spec.hosts == 1:
        return Place(spec.processes, request.scratch)
    return Place(
        spec.processes,
        request.scratch,
        request.host,
        spec.hosts,
        request.others,
        request.interface,
        request.patience,
    )


def inspection(request: InspectRequest, progress: Report) -> Inspected:
    """Finds out what an upload is."""
    from worker.inspect import inspect_upload

    facts = inspect_upload(request.kind, request.path, request.filename, request.spec, request.scratch)
    return Inspected(facts=facts)
