"""Lists in pages: an opaque cursor names the last id of the page before."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar

from fastapi import Query

from app.errors import InvalidParameter
from app.identifiers import is_id

Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before.")]
DEFAULT_LIMIT = 20


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=_Identified)


def position(cursor: str | None, prefix: str) -> str | None:
    """The id that a cursor stands for. Raises InvalidParameter for one that no page of this list gave."""
    if cursor is None:
        return None
    try:
        found = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        found = ""
    if not is_id(found, prefix):
        raise InvalidParameter("This cursor is none that the list gave: start again without one.", "cursor")
    return found


def page(found: Sequence[Record], limit: int) -> tuple[Sequence[Record], str | None]:
    """The page, and the cursor of the next one; `found` has one record more than `limit` where there is a next one."""
    if len(found) <= limit:
        return found, None
    return found[:limit], base64.urlsafe_b64encode(found[limit - 1].id.encode()).decode().rstrip("=")
