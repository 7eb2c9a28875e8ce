"""The JSON documents that clients read."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from app.contract.errors import Problem
from app.contract.estimate import Estimate
from app.contract.facts import (
    Applicability,
    Cost,
    DataKind,
    DatasetFacts,
    LayerFacts,
    ModelFacts,
    OutputKind,
    SplitFacts,
    Task,
    TensorFacts,
)
from app.contract.records import ArtifactRecord, JobRecord, UploadRecord
from app.contract.spec import ExportFormat, Step
from app.contract.states import JobState, UploadStatus

Item = TypeVar("Item")


class View(BaseModel):
    """Base: what is not documented is not sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Page(View, Generic[Item]):
    """One page of a list, newest first."""

    items: tuple[Item, ...]
    next: str | None = Field(description="Cursor of the next page; null on the last one.")


class UploadView(View):
    """What models and datasets share."""

    id: str
    filename: str
    sha256: str = Field(description="Of the uploaded bytes, in hexadecimal.")
    size_bytes: int
    status: UploadStatus
    problem: Problem | None = Field(description="Why the file was rejected.")
    spec: dict[str, Any] = Field(description="As it was uploaded.")
    created_at: datetime


class ModelView(UploadView):
    """An uploaded model. What the inspection finds out is null until the status is `ready`."""

    format: Literal["architecture", "huggingface", "onnx"] | None = None
    task: Task | None = None
    accepts: tuple[DataKind, ...] | None = Field(None, description="The kinds of dataset that can feed it.")
    inputs: tuple[TensorFacts, ...] | None = None
    classes: int | None = None
    labels: tuple[str, ...] | None = None
    parameters: int | None = None
    layers: tuple[LayerFacts, ...] | None = None
    native_file: str | None = None
    outputs: tuple[TensorFacts, ...] | None = None
    cost: Cost | None = None
    techniques: tuple[Applicability, ...] | None = None
    trainable: bool | None = None
    untrainable_reason: str | None = None
    output_kind: OutputKind | None = None
    single_samples: bool | None = None


class DatasetView(UploadView):
    """An uploaded dataset. What the inspection finds out is null until the status is `ready`."""

    kind: DataKind | None = None
    splits: dict[str, SplitFacts] | None = None
    labels: tuple[str, ...] | None = None


class JobView(View):
    """A job. `steps` are those of the recipe where one was named, with every default filled in."""

    id: str
    state: JobState
    progress: float = Field(ge=0, le=1)
    step: str | None = Field(description="What the job is doing now.")
    attempt: int = Field(description="Grows each time a worker starts the job; 0 before.")
    cancel_requested: bool
    queue_position: int | None = Field(description="1 is next; null unless queued.")
    eta_seconds: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Problem | None
    warnings: tuple[str, ...]
    goal_met: bool | None
    model: str
    dataset: str | None
    recipe: str | None
    steps: tuple[Step, ...]
    export: tuple[ExportFormat, ...]
    seed: int
    metadata: dict[str, Any]


class PlannedArtifact(View):
    """A file that a job would deliver."""

    name: str
    format: str


class DryRunView(View):
    """What a job would do: the steps with every default filled in, what they take, and what comes of them."""

    recipe: str | None
    steps: tuple[Step, ...]
    export: tuple[ExportFormat, ...]
    estimate: Estimate
    artifacts: tuple[PlannedArtifact, ...]


class ArtifactView(View):
    """A file that a job delivered."""

    name: str
    format: str
    size_bytes: int
    sha256: str = Field(description="In hexadecimal; also the ETag of the bytes.")
    media_type: str
    href: str = Field(description="Where the bytes are.")


class TechniqueView(View):
    """What can be done, and on what."""

    # `schema` is the name of a method of pydantic's.
    model_config = ConfigDict(populate_by_name=True)

    name: str
    family: str
    title: str
    needs: str
    applies_to: str
    devices: tuple[str, ...]
    may_not_follow: tuple[str, ...]
    exports: tuple[str, ...]
    requires_export: str | None
    step_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema of the step.")


class Check(View):
    """What one part of the service answered."""

    ok: bool
    detail: str


class Readiness(View):
    """Whether the service can take and do work."""

    status: Literal["ready"]
    checks: dict[Literal["database", "broker", "blobs", "worker"], Check]


class Liveness(View):
    """The process answers."""

    status: Literal["alive"]
    version: str


def model_view(record: UploadRecord) -> ModelView:
    """A model's record as clients read it."""
    facts = record.facts
    if not isinstance(facts, ModelFacts):
        return ModelView(**_upload(record))
    return ModelView(**_upload(record), **{name: getattr(facts, name) for name in ModelFacts.model_fields})


def dataset_view(record: UploadRecord) -> DatasetView:
    """A dataset's record as clients read it."""
    facts = record.facts
    if not isinstance(facts, DatasetFacts):
        return DatasetView(**_upload(record))
    return DatasetView(**_upload(record), **{name: getattr(facts, name) for name in DatasetFacts.model_fields})


def _upload(record: UploadRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in UploadView.model_fields}


def job_view(record: JobRecord) -> JobView:
    """A job's record as clients read it; not validated again, for it is read at every poll."""
    resolved = record.resolved
    return JobView.model_construct(
        id=record.id,
        state=record.state,
        progress=record.progress,
        step=record.step,
        attempt=record.attempt,
        cancel_requested=record.cancel_requested,
        queue_position=record.queue_position,
        eta_seconds=record.eta_seconds,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        error=record.error,
        warnings=record.warnings,
        goal_met=record.goal_met,
        model=resolved.model,
        dataset=resolved.dataset,
        recipe=resolved.recipe,
        steps=resolved.steps,
        export=resolved.export,
        seed=resolved.seed,
        metadata=record.spec.metadata,
    )


def artifact_view(record: ArtifactRecord) -> ArtifactView:
    """An artifact's record as clients read it."""
    return ArtifactView(
        name=record.name,
        format=record.format,
        size_bytes=record.size_bytes,
        sha256=record.sha256,
        media_type=record.media_type,
        href=f"/v1/jobs/{record.job_id}/artifacts/{record.name}",
    )


def answer(view: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A document as a response, written once and not validated again."""
    return Response(view.model_dump_json(by_alias=True), status, headers, "application/json")
