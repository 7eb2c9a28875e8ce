"""Rows to records, and documents to JSON text."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from app.contract.errors import Problem
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.records import (
    ArtifactRecord,
    JobRecord,
    KeyRecord,
    ResumableRecord,
    SeatRecord,
    UploadRecord,
    WorkerRecord,
)
from app.contract.spec import JobSpec, ResolvedSpec
from app.contract.states import JobState, UploadStatus

# Before this share is done, the time left is a guess.
MIN_PROGRESS_FOR_ETA = 0.02


def upload(row: Row[Any]) -> UploadRecord:
    """A row of `uploads`."""
    facts_class = ModelFacts if row.kind == "model" else DatasetFacts
    return UploadRecord(
        id=row.id,
        account=row.account,
        kind=row.kind,
        filename=row.filename,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        spec=json.loads(row.spec),
        status=UploadStatus(row.status),
        problem=problem(row.problem),
        facts=None if row.facts is None else facts_class.model_validate_json(row.facts),
        created_at=row.created_at,
    )


def resumable(row: Row[Any]) -> ResumableRecord:
    """A row of `resumable_uploads`."""
    return ResumableRecord(
        id=row.id,
        account=row.account,
        filename=row.filename,
        metadata=row.upload_metadata,
        size_bytes=row.size_bytes,
        received=row.received,
        promised_sha256=row.promised_sha256,
        sha256=row.sha256,
        finished=row.finished,
        attempt=row.attempt,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def job(row: Row[Any], now: datetime) -> JobRecord:
    """A row of `jobs` with `queue_position`."""
    return JobRecord(
        id=row.id,
        account=row.account,
        spec=JobSpec.model_validate_json(row.spec),
        resolved=ResolvedSpec.model_validate_json(row.resolved),
        state=JobState(row.state),
        progress=row.progress,
        step=row.step,
        attempt=row.attempt,
        cancel_requested=row.cancel_requested,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=problem(row.error),
        warnings=tuple(json.loads(row.warnings)),
        goal_met=row.goal_met,
        version=row.version,
        queue_position=row.queue_position,
        eta_seconds=eta(row.state, row.progress, row.attempt_started_at, now),
    )


def eta(state: str, progress: float, attempt_started_at: datetime | None, now: datetime) -> float | None:
    """Seconds left if the rest goes as fast as what is done; None unless running and far enough to tell."""
    if state != JobState.RUNNING or attempt_started_at is None or progress < MIN_PROGRESS_FOR_ETA:
        return None
    elapsed = max(0.0, (now - attempt_started_at).total_seconds())
    return elapsed * (1 - progress) / progress


def artifact(row: Row[Any]) -> ArtifactRecord:
    """A row of `artifacts`."""
    return ArtifactRecord(row.job_id, row.name, row.format, row.size_bytes, row.sha256, row.media_type, row.blob_key)


def key(row: Row[Any]) -> KeyRecord:
    """A row of `api_keys`, without the hash."""
    return KeyRecord(row.id, row.account, row.name, row.prefix, row.created_at, row.last_used_at, row.revoked_at)


def worker(row: Row[Any]) -> WorkerRecord:
    """A row of `workers`."""
    queues = tuple(name for name in row.queues.split(",") if name)
    return WorkerRecord(row.id, row.host, row.pid, queues, row.last_seen_at, row.sandbox or WorkerRecord.sandbox)


def seat(row: Row[Any], taken: bool, lost: bool) -> SeatRecord:
    """A row of `seats`, with what its work says."""
    cards = json.loads(row.cards)
    return SeatRecord(row.id, row.job_id, row.attempt, row.host, taken, lost, row.gone, problem(row.problem), cards)


def problem(text: str | None) -> Problem | None:
    """A stored problem."""
    return None if text is None else Problem.model_validate_json(text)
