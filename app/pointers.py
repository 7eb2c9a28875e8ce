"""What a validation found, as JSON pointers (RFC 6901) into the document that the client sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from app.contract.errors import pointer_part

MAX_VIOLATIONS = 20  # a client mends the first ones; a hostile document may have thousands
MAX_SHOWN = 80  # characters of an offending value that are repeated


class Violation(BaseModel):
    """One field at fault: where it is, what was expected and what came."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pointer: str
    detail: str


def violations(error: ValidationError, document: Any, prefix: str = "") -> list[Violation]:
    """Each field at fault once, in the order found, at most MAX_VIOLATIONS.

    `document` is what was validated; `prefix` is the pointer to it in what the client sent.
    """
    found: dict[str, Violation] = {}
    for fault in error.errors(include_url=False):
        if _follows(fault):
            continue
        where = prefix + pointer(fault["loc"], document, missing=fault["type"] == "missing")
        found.setdefault(where, Violation(pointer=where, detail=_detail(fault)))
        if len(found) == MAX_VIOLATIONS:
            break
    return list(found.values())


def pointer(location: Sequence[str | int], document: Any, *, missing: bool = False) -> str:
    """A location of pydantic's as a pointer: parts that are not in the document (tags of unions) are left out.

    The last part of a missing field's location is its name, so it stays.
    """
    parts: list[str] = []
    here = document
    for index, part in enumerate(location):
        inside = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if inside:
            here = here[part]
        elif not (missing and index == len(location) - 1):
            continue
        parts.append(pointer_part(part))
    return "".join(f"/{part}" for part in parts)


def sentence(found: Sequence[Violation]) -> str:
    """The first violation, and how many more there are."""
    first = f"{found[0].pointer}: {found[0].detail}" if found[0].pointer else found[0].detail
    return first if len(found) == 1 else f"{first} And {len(found) - 1} more, see errors."


def _follows(fault: ErrorDetails) -> bool:
    """Whether a list only counts as too short because its entries are at fault, which is said of each of them."""
    return fault["type"] == "too_short" and len(fault["input"]) >= fault["ctx"]["min_length"]


def _detail(fault: ErrorDetails) -> str:
    message = fault["msg"].removeprefix("Value error, ").rstrip(".")
    if fault["type"] in ("missing", "value_error", "extra_forbidden"):
        return f"{message}."
    return f"{message}; it is {_show(fault['input'])}."


def _show(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
