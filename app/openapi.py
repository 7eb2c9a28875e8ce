"""The OpenAPI document: what FastAPI finds out by itself, and the rest of the truth."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app import __version__
from app.errors import MEDIA_TYPE, ProblemDocument
from app.uploads.referring import Reference

DESCRIPTION = """Makes neural networks smaller and faster.

Upload a model and its data, submit a job, poll it, fetch artifacts that standard runtimes load, with a report that was
measured on those very artifacts. Every error is a problem document (RFC 9457) with a stable `code`. Every answer
carries `X-Request-Id`."""

REASONS = {
    304: "Not changed since the tag in If-None-Match.",
    400: "The request cannot be read.",
    401: "The API key is missing or not valid.",
    404: "There is no such thing, or it belongs to another account.",
    409: "The state of the resource does not allow this.",
    410: "The stored bytes are gone.",
    412: "If-Match names another tag.",
    413: "The body is too large.",
    415: "The body's media type or encoding is not taken.",
    416: "No byte of the range exists.",
    422: "The specification is not valid, or its parts do not fit each other.",
    423: "Another request is sending bytes of this upload.",
    429: "The account has too many unfinished uploads.",
    460: "The bytes have another checksum.",
    503: "A part of the service does not answer.",
}
TEXT: dict[str, Any] = {"type": "string"}
BYTES: dict[str, Any] = {"type": "string", "format": "binary"}
ETAG = {"ETag": {"description": "For If-None-Match.", "schema": TEXT}}
APPLIED = {"Preference-Applied": {"description": "`wait=N` where the answer was held.", "schema": TEXT}}
LOCATION = {"Location": {"description": "Where the new resource is.", "schema": TEXT}}


Responses = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Responses:
    """Responses with problem documents."""
    return {status: {"model": ProblemDocument, "description": REASONS[status]} for status in statuses}


def answers(success: Responses, *statuses: int) -> Responses:
    """What is known about successful responses, and those with problem documents."""
    return {**success, **problems(*statuses)}


def header(name: str, description: str, example: str) -> dict[str, Any]:
    """An optional request header."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": TEXT,
        "example": example,
    }


PREFER = header("Prefer", "`wait=N`: hold the answer until something changes, at most N (60) seconds.", "wait=30")
IF_NONE_MATCH = header("If-None-Match", "An ETag: 304 where nothing has changed since.", '"…"')


# Schemas of bodies that endpoints read by themselves, so that FastAPI does not know them.
_request_schemas: dict[str, dict[str, Any]] = {}


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A reference to the model's schema as clients may send it: with defaults, so not as it comes back."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}-Input")
    parts = schema.pop("$defs", {}) | {model.__name__: schema}
    _request_schemas.update({f"{name}-Input": part for name, part in parts.items()})
    return {"$ref": f"#/components/schemas/{model.__name__}-Input"}


def upload_body(spec_example: dict[str, Any]) -> dict[str, Any]:
    """The two ways to send a file, and the one to name what was sent before."""
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": BYTES, "spec": {"type": "string", "description": "JSON, as in the query."}},
        "example": {"file": "…", "spec": str(spec_example).replace("'", '"')},
    }
    named = {"upload": "upl_01jd3m8s5q2v7x9z4b6c8d0e2f", "filename": "model.safetensors", "spec": spec_example}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": BYTES},
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": request_schema(Reference), "example": named},
            },
        },
        "parameters": [
            PREFER,
            header("Repr-Digest", "Of the body (RFC 9530); checked where sent.", "sha-256=:…:"),
            header("Content-Digest", "As Repr-Digest.", "sha-256=:…:"),
        ],
    }


def describe(app: FastAPI, keys_required: bool) -> dict[str, Any]:
    """The document; built once."""
    if app.openapi_schema is None:
        document = get_openapi(title="Tersor", version=__version__, description=DESCRIPTION, routes=app.routes)
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key, `tsr_…`."}
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _complete(operation, path.startswith("/v1/"), keys_required)
        document["components"]["schemas"] |= _request_schemas
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(operation: dict[str, Any], guarded: bool, keys_required: bool) -> None:
    responses = operation["responses"]
    # FastAPI's own validation answer: ours are problems with status 400.
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for status, response in responses.items():
        if status >= "400" and "application/json" in response.get("content", {}):
            response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
    if guarded:
        operation["security"] = [{"key": []}] if keys_required else [{"key": []}, {}]
