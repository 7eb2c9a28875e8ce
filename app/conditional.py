"""Conditional requests and ranges (RFC 9110), and digests (RFC 9530), as pure functions on header values."""

from __future__ import annotations

import base64
import binascii
import re

from app.contract.errors import RangeNotSatisfiable
from app.errors import InvalidParameter

_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.IGNORECASE)
_SHA256 = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([^:]*):")
_SHA256_BYTES = 32


def matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match or If-Match names this (strong, quoted) tag; the comparison is weak."""
    if header is None:
        return False
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in header.split(","))


def wanted_range(header: str | None, if_range: str | None, etag: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None for the whole: no range, several, one that cannot be read, or
    If-Range with another tag.

    Raises RangeNotSatisfiable where no byte of the range exists.
    """
    if header is None or (if_range is not None and if_range.strip() != etag):
        return None
    found = _RANGE.fullmatch(header.strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        if int(last) == 0 or size == 0:
            raise RangeNotSatisfiable(f"The artifact has {size} bytes: a suffix of {last} is empty.")
        return max(0, size - int(last)), size
    start, end = int(first), min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable(f"The artifact has {size} bytes: none is at {start}.")
    return start, end


def digest_header(sha256: str) -> str:
    """A hexadecimal SHA-256 as the value of Repr-Digest."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def expected_sha256(header: str | None, name: str) -> bytes | None:
    """The SHA-256 in a Content-Digest or Repr-Digest header; None where there is none, also beside other algorithms.

    Raises InvalidParameter for one that is not 32 bytes in base64.
    """
    found = _SHA256.search(header or "")
    if found is None:
        return None
    try:
        digest = base64.b64decode(found.group(1), validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != _SHA256_BYTES:
        raise InvalidParameter(f"{name} is `sha-256=:<32 bytes in base64>:`; it is {header!r}.", name)
    return digest
