"""Ids as they come in paths: what cannot be one is not looked up."""

from __future__ import annotations

import re

from app.contract.errors import NotFound

_TAIL = re.compile(r"[0-9a-z]{26}")


def is_id(text: str, prefix: str) -> bool:
    """Whether this could be an id of that kind."""
    return text.startswith(f"{prefix}_") and _TAIL.fullmatch(text[len(prefix) + 1 :]) is not None


def require_id(text: str, prefix: str) -> str:
    """The id itself; raises NotFound for what cannot be one, so that no odd text reaches a database."""
    if not is_id(text, prefix):
        raise NotFound(f"{text[:64]!r} is not an id: they look like {prefix}_ and 26 characters of 0-9, a-z.")
    return text
