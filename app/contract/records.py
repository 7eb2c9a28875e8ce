"""What the store hands out: plain frozen data. Times are UTC and carry their time zone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from app.contract.errors import Problem
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.spec import JobSpec, ResolvedSpec
from app.contract.states import JobState, UploadStatus

UploadKind = Literal["model", "dataset"]
WorkKind = Literal["model", "dataset", "job", "seat"]


@dataclass(frozen=True)
class UploadRecord:
    """A model or a dataset: the bytes' digest, and what the inspection found (`facts`) or objected to (`problem`)."""

    id: str
    account: str
    kind: UploadKind
    filename: str
    sha256: str
    size_bytes: int
    spec: dict[str, Any]
    status: UploadStatus
    problem: Problem | None
    facts: ModelFacts | DatasetFacts | None
    created_at: datetime


@dataclass(frozen=True)
class ResumableRecord:
    """A resumable upload: bytes on their way to the blob store.

    The first `received` bytes are durable; what the store may hold behind them does not count. `sha256` is known when
    all have come, and from then on keeps the blob from being deleted; `finished` says that the blob is in its place.
    `attempt` is the fencing token of the request that holds the upload. `metadata` is the client's header as it came.
    """

    id: str
    account: str
    filename: str
    metadata: str
    size_bytes: int
    received: int
    promised_sha256: str | None
    sha256: str | None
    finished: bool
    attempt: int
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class JobRecord:
    """A job.

    `progress` is 0..1. `attempt` is the fencing token of the latest claim, 0 before the first. `version` grows with
    every change and drives the ETag. `queue_position` is 1 for the job that is next, and None unless queued.
    """

    id: str
    account: str
    spec: JobSpec
    resolved: ResolvedSpec
    state: JobState
    progress: float
    step: str | None
    attempt: int
    cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Problem | None
    warnings: tuple[str, ...]
    goal_met: bool | None
    version: int
    queue_position: int | None
    eta_seconds: float | None


@dataclass(frozen=True)
class ArtifactRecord:
    """One file that a job delivered; `key` is where the blob store has it."""

    job_id: str
    name: str
    format: str
    size_bytes: int
    sha256: str
    media_type: str
    key: str


@dataclass(frozen=True)
class KeyRecord:
    """An API key without its secret."""

    id: str
    account: str
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True)
class Claim:
    """The right to run one piece of work. `attempt` is the fencing token: writes of an older one are refused."""

    work_id: str
    kind: WorkKind
    attempt: int
    owner: str


@dataclass(frozen=True)
class SeatRecord:
    """A worker's part in an attempt at a job over several hosts; 0 is the one that claimed the job.

    `taken` once a worker has it; `lost` where that one is silent for longer than its lease, `gone` where it had to
    leave, with the problem where there was one. `cards` are what its processes tell all others before they connect.
    """

    id: str
    job_id: str
    attempt: int
    host: int
    taken: bool
    lost: bool
    gone: bool
    problem: Problem | None
    cards: Mapping[str, str]


@dataclass(frozen=True)
class WorkerRecord:
    """A worker process that has said it is alive. `sandbox` says which walls stand around its jobs."""

    id: str
    host: str
    pid: int
    queues: tuple[str, ...]
    last_seen_at: datetime
    sandbox: str = "unknown"
