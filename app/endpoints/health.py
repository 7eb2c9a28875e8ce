"""Liveness, readiness and metrics; none needs a key."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import anyio
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app import __version__, errors, schemas
from app.contract.errors import ServiceUnavailable
from app.metrics import WORKER_MAX_AGE_SECONDS
from app.openapi import TEXT, answers, problems
from app.schemas import Check, Liveness, Readiness
from app.services import Services, in_thread, services_of

log = logging.getLogger("tersor.health")
router = APIRouter(tags=["health"])

# A part that needs longer than this to say that it is well is not.
CHECK_SECONDS = 5.0


@router.get("/healthz")
async def health() -> Liveness:
    """Whether the process answers."""
    return Liveness(status="alive", version=__version__)


@router.get("/readyz", response_model=Readiness, responses=problems(503))
async def readiness(request: Request) -> Response:
    """Whether database, broker and blobs answer and a worker is alive; 503 says which does not.

    `sandbox` says which walls stand around the jobs of the workers that are alive; it never makes the service unready.
    """
    checks: dict[str, Check] = {}
    async with anyio.create_task_group() as group:
        for name, question in _questions(services_of(request)).items():
            group.start_soon(_ask, checks, name, question)
    if all(check.ok for check in checks.values()):
        return schemas.answer(Readiness.model_validate({"status": "ready", "checks": checks}))
    missing = "; ".join(f"{name}: {check.detail}" for name, check in sorted(checks.items()) if not check.ok)
    problem = errors.document(
        ServiceUnavailable(f"Not ready. {missing}."),
        checks={name: check.model_dump() for name, check in checks.items()},
    )
    return errors.answer(problem)


@router.get(
    "/metrics",
    response_class=Response,
    responses=answers(
        {200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": TEXT}}}}, 503
    ),
)
async def metrics(request: Request) -> Response:
    """Requests, uploads, jobs, queue and workers."""
    text = await in_thread(services_of(request).metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _questions(services: Services) -> dict[str, Callable[[], str]]:
    """Each gives a reason for its part being well, or raises."""

    def database() -> str:
        services.store.ping()
        return "answers"

    def broker() -> str:
        if not services.doorbell.ping():
            raise ConnectionError
        return "answers"

    def blobs() -> str:
        services.blobs.ping()
        return "answers"

    def worker() -> str:
        alive = len(services.store.live_workers(WORKER_MAX_AGE_SECONDS))
        if not alive:
            raise ServiceUnavailable(f"no worker was seen in the last {WORKER_MAX_AGE_SECONDS:.0f} s")
        return f"{alive} alive"

    def sandbox() -> str:
        count = Counter(worker.sandbox for worker in services.store.live_workers(WORKER_MAX_AGE_SECONDS))
        return "; ".join(f"{sentence} ({n} x)" for sentence, n in sorted(count.items())) or "no worker to ask"

    return {"database": database, "broker": broker, "blobs": blobs, "worker": worker, "sandbox": sandbox}


async def _ask(checks: dict[str, Check], name: str, question: Callable[[], str]) -> None:
    try:
        with anyio.fail_after(CHECK_SECONDS):
            checks[name] = Check(ok=True, detail=await anyio.to_thread.run_sync(question, abandon_on_cancel=True))
    except ServiceUnavailable as error:
        checks[name] = Check(ok=False, detail=error.detail)
    except Exception as error:  # whatever a driver raises is the finding; its text may name hosts and paths
        log.warning("%s is not ready: %s", name, error)
        checks[name] = Check(ok=False, detail=f"does not answer ({type(error).__name__})")
