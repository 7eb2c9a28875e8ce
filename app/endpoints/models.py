"""Models: upload, look, list."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app import schemas
from app.auth import Account
from app.contract.states import UploadStatus
from app.openapi import APPLIED, LOCATION, PREFER, answers, problems, upload_body
from app.pagination import DEFAULT_LIMIT, Cursor, Limit
from app.prefer import applied
from app.schemas import ModelView, Page, model_view
from app.uploads.receiving import receive
from app.uploads.records import find, inspected, list_page

router = APIRouter(prefix="/v1/models", tags=["models"])

EXAMPLE: dict[str, Any] = {
    "task": "image-classification",
    "input": {"shape": [1, 28, 28], "dtype": "float32"},
    "architecture": {
        "layers": [{"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 10}],
    },
}


@router.post(
    "",
    status_code=201,
    response_model=ModelView,
    responses=answers({201: {"headers": LOCATION | APPLIED}}, 400, 401, 404, 409, 410, 413, 415, 422, 423, 503),
    openapi_extra=upload_body(EXAMPLE),
)
async def upload_model(
    request: Request,
    account: Account,
    filename: Annotated[str | None, Query(description="The file's name, for a raw body.")] = None,
    spec: Annotated[str | None, Query(description="JSON with task, architecture, input, labels.")] = None,
) -> Response:
    """Takes a model: its bytes, or as JSON the name of bytes sent before. An inspection follows: see `status`."""
    record, waited = await inspected(request, await receive(request, account, "model"))
    headers = {"Location": f"/v1/models/{record.id}"} | applied(waited)
    return schemas.answer(model_view(record), 201, headers)


@router.get(
    "/{model_id}",
    response_model=ModelView,
    responses=answers({200: {"headers": APPLIED}}, 401, 404, 503),
    openapi_extra={"parameters": [PREFER]},
)
async def get_model(request: Request, account: Account, model_id: str) -> Response:
    """A model; `Prefer: wait` waits for the end of its inspection."""
    record, waited = await inspected(request, await find(request, account, "model", model_id))
    return schemas.answer(model_view(record), headers=applied(waited))


@router.get("", response_model=Page[ModelView], responses=problems(400, 401, 503))
async def list_models(
    request: Request,
    account: Account,
    status: UploadStatus | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Response:
    """The account's models, newest first."""
    found, following = await list_page(request, account, "model", cursor, limit, status)
    return schemas.answer(Page[ModelView](items=tuple(map(model_view, found)), next=following))
