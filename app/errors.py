"""Errors as HTTP answers (RFC 9457): the only place that knows both an error class and its status."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from obstore.exceptions import BaseError as StoreError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import exc
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.contract import errors
from app.contract.errors import TersorError
from app.pointers import Violation, sentence

log = logging.getLogger("tersor.http")

MEDIA_TYPE = "application/problem+json"

# The nearest class of an error's ancestry decides.
STATUS: dict[type[TersorError], int] = {
    errors.TersorError: 500,
    errors.InvalidRequest: 400,
    errors.UploadIncomplete: 400,
    errors.Unauthorized: 401,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.BlobMissing: 410,
    errors.PreconditionFailed: 412,
    errors.UploadTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.RangeNotSatisfiable: 416,
    errors.InvalidSpec: 422,
    errors.OrderRefused: 422,
    errors.ModelRejected: 422,
    errors.PackedDamaged: 422,
    errors.DatasetRejected: 422,
    errors.DatasetMismatch: 422,
    errors.ModelsMismatch: 422,
    errors.Unsupported: 422,
    errors.IdempotencyKeyReused: 422,
    errors.DigestMismatch: 422,
    errors.UploadLocked: 423,
    errors.TooManyUploads: 429,
    errors.ChecksumMismatch: 460,  # of the tus protocol
    errors.ServiceUnavailable: 503,
}

# What a client needs besides the document, by status.
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 423: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}


class InvalidParameter(errors.InvalidRequest):
    """A query parameter or a header is not what this endpoint takes."""

    code = "invalid_parameter"
    title = "Invalid parameter"

    def __init__(self, detail: str, parameter: str) -> None:
        super().__init__(detail)
        self.parameter = parameter


class InvalidFields(errors.InvalidSpec):
    """One or several fields of a specification are missing, unknown or out of range."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(sentence(violations), pointer=violations[0].pointer)
        self.violations = tuple(violations)


class ProblemDocument(BaseModel):
    """An error (RFC 9457). `code` is stable; branch on it, show `detail`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:tersor:problem:invalid_spec",
                    "title": "Invalid specification",
                    "status": 422,
                    "detail": "/steps/0/sparsity: Input should be less than 1; it is 2.",
                    "code": "invalid_spec",
                    "pointer": "/steps/0/sparsity",
                    "retryable": False,
                }
            ]
        },
    )

    type: str = Field(description="`urn:tersor:problem:` and the code.")
    title: str
    status: int
    detail: str = Field(description="What was expected, what came, what to do.")
    code: str
    pointer: str | None = Field(None, description="JSON pointer of the field at fault, where there is one.")
    parameter: str | None = Field(None, description="The query parameter or header at fault, where there is one.")
    retryable: bool = Field(description="Whether the same request may succeed later.")
    errors: tuple[Violation, ...] | None = Field(
        None, description="Every field at fault, where several were looked at."
    )
    checks: dict[str, Any] | None = Field(None, description="Of /readyz: what each part answered.")


def status_of(error: TersorError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def document(error: TersorError, **members: Any) -> ProblemDocument:
    """An error as the document that a client reads."""
    return ProblemDocument(
        type=f"urn:tersor:problem:{error.code}",
        title=error.title,
        status=status_of(error),
        detail=error.detail,
        code=error.code,
        pointer=error.pointer,
        parameter=error.parameter if isinstance(error, InvalidParameter) else None,
        retryable=error.retryable,
        errors=error.violations if isinstance(error, InvalidFields) else None,
        **members,
    )


def answer(problem: ProblemDocument, headers: dict[str, str] | None = None) -> Response:
    """A problem as a response."""
    return Response(
        problem.model_dump_json(exclude_none=True),
        problem.status,
        {**HEADERS.get(problem.status, {}), **(headers or {})},
        MEDIA_TYPE,
    )


def internal_error() -> Response:
    """The answer to an error that nobody foresaw: no word about its inside."""
    unforeseen = TersorError("Something went wrong inside the service. It was logged under this X-Request-Id.")
    return answer(document(unforeseen))


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem document."""
    app.add_exception_handler(TersorError, _on_tersor_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    for lost in (exc.OperationalError, exc.InterfaceError, exc.TimeoutError):
        app.add_exception_handler(lost, _on_database_lost)
    app.add_exception_handler(StoreError, _on_blobs_lost)


async def _on_tersor_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TersorError)
    if status_of(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return answer(document(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    details = {
        HTTPStatus.NOT_FOUND: f"There is no {request.url.path} here; /openapi.json lists what there is.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not allowed on {request.url.path}; see the Allow header.",
    }
    code = status.phrase.lower().replace(" ", "_")
    problem = ProblemDocument(
        type=f"urn:tersor:problem:{code}",
        title=status.phrase,
        status=status,
        detail=details.get(status, str(error.detail)),
        code=code,
        retryable=False,
    )
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route alone with this path; FastAPI's own pages are no operations.
        route = request.scope.get("route")
        operations = request.app.openapi()["paths"].get(route.path, {}) if route is not None else {}
        if operations:
            headers["Allow"] = ", ".join(sorted(method.upper() for method in operations))
    return answer(problem, headers)


async def _on_invalid_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    refused = InvalidParameter(f"{name}: {fault['msg']}; it is {str(fault.get('input'))[:100]!r}.", name)
    return answer(document(refused))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return answer(document(errors.UploadIncomplete()))


async def _on_database_lost(request: Request, error: Exception) -> Response:
    log.error("%s %s: the database does not answer", request.method, request.url.path, exc_info=error)
    return answer(document(errors.ServiceUnavailable("The database does not answer. Try again in a moment.")))


async def _on_blobs_lost(request: Request, error: Exception) -> Response:
    log.error("%s %s: the blob store does not answer", request.method, request.url.path, exc_info=error)
    return answer(document(errors.ServiceUnavailable("The blob store does not answer. Try again in a moment.")))
