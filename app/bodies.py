"""Request bodies: read in pieces, bounded, and never trusted."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from app.conditional import expected_sha256
from app.contract.errors import InvalidRequest, UnsupportedMediaType, UploadIncomplete, UploadTooLarge

# A client that sends nothing for this long is taken for gone.
IDLE_SECONDS = 60.0


def content_type(request: Request) -> str:
    """The media type alone, in lower case; empty where the request has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_length(request: Request, max_bytes: int) -> None:
    """Raises UploadTooLarge for a body that says itself that it is larger, before anything of it is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise UploadTooLarge(f"The body has {length} bytes; this takes at most {max_bytes}.")


def refuse_encoding(request: Request) -> None:
    """Raises UnsupportedMediaType for a body with a Content-Encoding."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Send the body as it is, without Content-Encoding; it is {encoding!r}.")


async def pieces(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body as it comes.

    Raises UploadTooLarge beyond `max_bytes`, and UploadIncomplete where the client stops, goes away, or sent a
    Content-Digest or Repr-Digest (RFC 9530) of other bytes.
    """
    check = _digest_check(request)
    stream, size = request.stream(), 0
    while piece := await _next(stream):
        size += len(piece)
        if size > max_bytes:
            raise UploadTooLarge(f"The body is larger than {max_bytes} bytes, which is the most this takes.")
        check(piece)
        yield piece
    check(None)


async def _next(stream: AsyncIterator[bytes]) -> bytes:
    try:
        with anyio.fail_after(IDLE_SECONDS):
            return await anext(stream, b"")
    except ClientDisconnect:
        raise UploadIncomplete() from None
    except TimeoutError:
        raise UploadIncomplete(f"Nothing came for {IDLE_SECONDS:.0f} s. Nothing was kept: send it again.") from None


def _digest_check(request: Request) -> Callable[[bytes | None], None]:
    """Takes every piece and None at the end; then it raises UploadIncomplete unless all promised digests hold."""
    names = ("Content-Digest", "Repr-Digest")
    promised = {name: digest for name in names if (digest := expected_sha256(request.headers.get(name), name))}
    if not promised:
        return lambda piece: None
    hashed = hashlib.sha256()

    def check(piece: bytes | None) -> None:
        if piece is not None:
            hashed.update(piece)
            return
        for name, digest in promised.items():
            if not hmac.compare_digest(digest, hashed.digest()):
                raise UploadIncomplete(f"The body has another SHA-256 than its {name} says. Send it again.")

    return check


async def read_json(request: Request, max_bytes: int) -> Any:
    """A JSON body. Raises UnsupportedMediaType, UploadTooLarge, or InvalidRequest for what is not strict JSON."""
    media = content_type(request)
    if media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMediaType(f"Send JSON as application/json; it came as {media or 'nothing'!r}.")
    refuse_encoding(request)
    refuse_length(request, max_bytes)
    body = bytearray()
    async for piece in pieces(request, max_bytes):
        body += piece
    return parse_json(bytes(body), "The body")


def parse_json(text: bytes | str, what: str) -> Any:
    """Strict JSON (RFC 8259): no NaN, no lone surrogates, no number beyond a double, nested 200 deep at most.

    Raises InvalidRequest.
    """
    try:
        value = from_json(text, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e400 is JSON, but infinite as a double
        return value
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not JSON as RFC 8259 has it: {error}.") from None
