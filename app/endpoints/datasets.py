"""Datasets: upload, look, list."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app import schemas
from app.auth import Account
from app.contract.states import UploadStatus
from app.openapi import APPLIED, LOCATION, PREFER, answers, problems, upload_body
from app.pagination import DEFAULT_LIMIT, Cursor, Limit
from app.prefer import applied
from app.schemas import DatasetView, Page, dataset_view
from app.uploads.receiving import receive
from app.uploads.records import find, inspected, list_page

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.post(
    "",
    status_code=201,
    response_model=DatasetView,
    responses=answers({201: {"headers": LOCATION | APPLIED}}, 400, 401, 404, 409, 410, 413, 415, 422, 423, 503),
    openapi_extra=upload_body({}),
)
async def upload_dataset(
    request: Request,
    account: Account,
    filename: Annotated[str | None, Query(description="The file's name, for a raw body.")] = None,
    spec: Annotated[str | None, Query(description="JSON; nothing may stand in it yet.")] = None,
) -> Response:
    """Takes a dataset: its bytes, or as JSON the name of bytes sent before. An inspection follows: see `status`."""
    record, waited = await inspected(request, await receive(request, account, "dataset"))
    headers = {"Location": f"/v1/datasets/{record.id}"} | applied(waited)
    return schemas.answer(dataset_view(record), 201, headers)


@router.get(
    "/{dataset_id}",
    response_model=DatasetView,
    responses=answers({200: {"headers": APPLIED}}, 401, 404, 503),
    openapi_extra={"parameters": [PREFER]},
)
async def get_dataset(request: Request, account: Account, dataset_id: str) -> Response:
    """A dataset; `Prefer: wait` waits for the end of its inspection."""
    record, waited = await inspected(request, await find(request, account, "dataset", dataset_id))
    return schemas.answer(dataset_view(record), headers=applied(waited))


@router.get("", response_model=Page[DatasetView], responses=problems(400, 401, 503))
async def list_datasets(
    request: Request,
    account: Account,
    status: UploadStatus | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Response:
    """The account's datasets, newest first."""
    found, following = await list_page(request, account, "dataset", cursor, limit, status)
    return schemas.answer(Page[DatasetView](items=tuple(map(dataset_view, found)), next=following))
