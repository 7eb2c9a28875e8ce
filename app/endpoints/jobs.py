"""Jobs: submit, poll, list, cancel, and the report at the end."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app import schemas
from app.auth import Account
from app.bodies import read_json
from app.conditional import matches
from app.contract.errors import NotFound
from app.contract.records import JobRecord
from app.contract.report import Report
from app.contract.spec import JobSpec
from app.contract.states import JobState
from app.drawing import sensitivity
from app.identifiers import require_id
from app.openapi import (
    APPLIED,
    ETAG,
    IF_NONE_MATCH,
    LOCATION,
    PREFER,
    REASONS,
    TEXT,
    answers,
    header,
    problems,
    request_schema,
)
from app.pagination import DEFAULT_LIMIT, Cursor, Limit, page, position
from app.prefer import applied, hold, preferred_wait
from app.schemas import DryRunView, JobView, Page, job_view
from app.services import in_thread, services_of
from app.submitting import dry_run as planned
from app.submitting import idempotency_key, parse, submit

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SPEC_EXAMPLE: dict[str, Any] = {
    "model": "mdl_01jd3m8s5q2v7x9z4b6c8d0e2f",
    "dataset": "dst_01jd3m8s5q2v7x9z4b6c8d0e2f",
    "steps": [
        {"technique": "prune", "sparsity": 0.8, "schedule": "cubic", "training": {"epochs": 4, "distill": {}}},
        {"technique": "quantize", "method": "static"},
    ],
    "export": ["native", "onnx"],
}
SUBMITTED = {
    "Retry-After": {"description": "Seconds until a look is worth while.", "schema": TEXT},
    "Idempotency-Replayed": {"description": "`true` where the key had been used for this very job.", "schema": TEXT},
}


@router.post(
    "",
    status_code=202,
    response_model=JobView,
    responses=answers(
        {
            200: {"model": DryRunView, "description": "What the job would do (`dry_run=true`)."},
            202: {"headers": LOCATION | ETAG | APPLIED | SUBMITTED},
        },
        400,
        401,
        409,
        413,
        415,
        422,
        503,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": request_schema(JobSpec), "example": SPEC_EXAMPLE}},
        },
        "parameters": [
            header("Idempotency-Key", "The same key with the same body gives the same job.", "8e03978e-40d5"),
            PREFER,
        ],
    },
)
async def submit_job(
    request: Request,
    account: Account,
    dry_run: Annotated[bool, Query(description="Only say what the job would do.")] = False,
) -> Response:
    """Submits a job. One whose model or dataset is still being inspected waits for the verdict.

    With `dry_run=true` nothing is submitted: the answer has the steps with every default, an estimate of time and
    memory, and the artifacts that would come.
    """
    services = services_of(request)
    key = idempotency_key(request.headers.get("idempotency-key"))
    spec = parse(await read_json(request, services.settings.max_json_bytes))
    if dry_run:
        return schemas.answer(await in_thread(planned, services.store, account, spec))
    job, created = await in_thread(submit, services.store, account, spec, key)
    if created:
        services.ring(job.id)
    job, waited = await _changed(request, job)
    headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": "1", "ETag": _etag(job)} | applied(waited)
    return schemas.answer(job_view(job), 202, headers if created else headers | {"Idempotency-Replayed": "true"})


@router.get(
    "/{job_id}",
    response_model=JobView,
    responses=answers(
        {
            200: {"headers": ETAG | APPLIED},
            304: {"description": REASONS[304], "headers": ETAG | APPLIED},
        },
        401,
        404,
        503,
    ),
    openapi_extra={"parameters": [IF_NONE_MATCH, PREFER]},
)
async def get_job(request: Request, account: Account, job_id: str) -> Response:
    """A job; cheap to poll with If-None-Match, cheaper with `Prefer: wait`, which answers when it changes."""
    job = await in_thread(services_of(request).store.get_job, account, require_id(job_id, "job"))
    known = request.headers.get("if-none-match")
    waited = None
    if known is None or matches(known, _etag(job)):
        job, waited = await _changed(request, job)
    headers = {"ETag": _etag(job)} | applied(waited)
    if matches(known, _etag(job)):
        return Response(status_code=304, headers=headers)
    return schemas.answer(job_view(job), headers=headers)


@router.get("", response_model=Page[JobView], responses=problems(400, 401, 503))
async def list_jobs(
    request: Request,
    account: Account,
    state: JobState | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Response:
    """The account's jobs, newest first."""
    below = position(cursor, "job")
    found = await in_thread(services_of(request).store.list_jobs, account, state, below, limit + 1)
    shown, following = page(found, limit)
    # Built of finished views: they are not validated again.
    return schemas.answer(Page[JobView].model_construct(items=tuple(map(job_view, shown)), next=following))


@router.post(
    "/{job_id}/cancel",
    response_model=JobView,
    responses=answers(
        {
            200: {"description": "It is cancelled.", "headers": ETAG},
            202: {"model": JobView, "description": "Its worker was asked to end it.", "headers": ETAG},
        },
        401,
        404,
        409,
        503,
    ),
)
async def cancel_job(request: Request, account: Account, job_id: str) -> Response:
    """Cancels a job: a queued one at once, a running one within seconds."""
    job = await in_thread(services_of(request).store.request_cancel, account, require_id(job_id, "job"))
    status = 200 if job.state is JobState.CANCELLED else 202
    return schemas.answer(job_view(job), status, {"ETag": _etag(job)})


@router.get("/{job_id}/report", response_model=Report, responses=problems(401, 404, 409, 503))
async def get_report(request: Request, account: Account, job_id: str) -> Response:
    """What was measured on the uploaded model and on each artifact; 409 until the job has succeeded."""
    report = await in_thread(services_of(request).store.report, account, require_id(job_id, "job"))
    return schemas.answer(Report.model_validate(report))


@router.get(
    "/{job_id}/report/sensitivity.svg",
    response_class=Response,
    responses=answers(
        {200: {"description": "The picture.", "content": {"image/svg+xml": {"schema": TEXT}}}}, 401, 404, 409, 503
    ),
)
async def get_sensitivity(request: Request, account: Account, job_id: str) -> Response:
    """How much each layer minds being pruned, drawn: of the first step that measured it (prune with scope auto)."""
    stored = await in_thread(services_of(request).store.report, account, require_id(job_id, "job"))
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in Report.model_validate(stored).steps:
        rows = step.details.get("sensitivity")
        if isinstance(rows, list) and not curves:
            for row in rows:
                point = float(row["sparsity"] or 0), float(row["divergence"] or 0)
                curves.setdefault(str(row["layer"]), []).append(point)
    if not curves:
        raise NotFound("No step of the job measured how sensitive layers are: prune with scope auto does.")
    return Response(sensitivity(curves), media_type="image/svg+xml")


async def _changed(request: Request, job: JobRecord) -> tuple[JobRecord, int | None]:
    """The job after its next change where the client is ready to wait; a job that has ended changes no more."""
    seconds = preferred_wait(request)
    if seconds is None or job.state.is_final:
        return job, seconds
    store = services_of(request).store
    await hold(request, seconds, lambda: store.job_version(job.account, job.id) != job.version)
    return await in_thread(store.get_job, job.account, job.id), seconds


def _etag(job: JobRecord) -> str:
    """Changes with the job, and with its place in the queue."""
    return f'"{job.id}.{job.version}.{job.queue_position or 0}"'
