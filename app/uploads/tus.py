"""The tus protocol's headers (version 1.0.0): read from requests, written into answers, and what all answers share."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from email.utils import format_datetime

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.bodies import content_type
from app.contract.blobs.appender import Checksum
from app.contract.errors import InvalidRequest, PreconditionFailed, UnsupportedMediaType, UploadTooLarge
from app.contract.records import ResumableRecord
from app.errors import InvalidParameter

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,termination,expiration,checksum"
PATH = "/v1/uploads"
MEDIA_TYPE = "application/offset+octet-stream"
# Digest sizes in bytes. The protocol demands SHA-1: it finds what a network breaks, and nothing more is asked of it.
ALGORITHMS = {"sha256": 32, "sha1": 20}
MAX_METADATA = 8 << 10  # a file's name, its type and its digest take a few hundred bytes
# Methods that a client which cannot send them may name in X-HTTP-Method-Override of a POST. (Not HEAD, which all can
# send, and whose answers have no body: whoever sent a POST would wait for one.)
OVERRIDES = {"PATCH", "DELETE"}
# Answers after which a client asks for the offset and sends again. A long body that nobody takes any more is cut off
# then, for otherwise clients send it to its end before they read the answer.
COME_BACK = (409, 423, 503)
WORTH_CUTTING_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")

_NUMBER = re.compile(r"[0-9]{1,18}")  # what a database's 64 bits hold
_KEY = re.compile(r"[!-+\--~]+")  # printable ASCII but space and comma


class TusProtocol:
    """Around every request under PATH: names the version in the answer, and honours X-HTTP-Method-Override."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not (scope["path"] == PATH or scope["path"].startswith(f"{PATH}/")):
            await self._app(scope, receive, send)
            return
        wanted = dict(scope["headers"]).get(b"x-http-method-override", b"").decode("latin-1").upper()
        if scope["method"] == "POST" and wanted in OVERRIDES:
            scope["method"] = wanted

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"tus-resumable", VERSION.encode())]
                if message["status"] == 412:
                    extra.append((b"tus-version", VERSION.encode()))
                if message["status"] in COME_BACK and _length(scope) > WORTH_CUTTING_BYTES:
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await self._app(scope, receive, send_on)


def _length(scope: Scope) -> int:
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if _NUMBER.fullmatch(length.decode("latin-1")) else 0


def require_version(request: Request) -> None:
    """Raises PreconditionFailed for a client of another version of the protocol, or of none."""
    version = request.headers.get("tus-resumable")
    if version != VERSION:
        raise PreconditionFailed(f"Send `Tus-Resumable: {VERSION}`; it is {version and version[:40]!r}.")


def require_media_type(request: Request) -> None:
    """Raises UnsupportedMediaType for bytes that are sent as something else."""
    media = content_type(request)
    if media != MEDIA_TYPE:
        raise UnsupportedMediaType(f"Send the bytes as {MEDIA_TYPE}; they came as {media or 'nothing'!r}.")


def length_of(request: Request, max_bytes: int) -> int:
    """Upload-Length. Raises InvalidParameter, InvalidRequest for an empty file, UploadTooLarge."""
    if "upload-length" not in request.headers:
        raise InvalidParameter(
            "Upload-Length is missing: the file's size in bytes. It cannot be deferred (Upload-Defer-Length).",
            "Upload-Length",
        )
    length = _number(request, "Upload-Length")
    if length is None or length > max_bytes:
        raise UploadTooLarge(f"The file is larger than {max_bytes} bytes, which is the most this service takes.")
    if not length:
        raise InvalidRequest("The file is empty: it has 0 bytes. Send the file itself.")
    return length


def offset_of(request: Request) -> int | None:
    """Upload-Offset; None for one that no upload can stand at. Raises InvalidParameter."""
    if "upload-offset" not in request.headers:
        raise InvalidParameter("Upload-Offset is missing: how many bytes have come before these.", "Upload-Offset")
    return _number(request, "Upload-Offset")


def _number(request: Request, name: str) -> int | None:
    text = request.headers[name].strip()
    if not (text.isascii() and text.isdecimal()):
        raise InvalidParameter(f"{name} is a number of bytes in decimal digits; it is {text[:40]!r}.", name)
    text = text.lstrip("0") or "0"
    return int(text) if _NUMBER.fullmatch(text) else None


def checksum_of(request: Request) -> Checksum | None:
    """A fresh hash of the algorithm in Upload-Checksum, and the value it shall have. Raises InvalidParameter."""
    header = request.headers.get("upload-checksum")
    if header is None:
        return None
    algorithm, _, encoded = header.strip().partition(" ")
    if algorithm not in ALGORITHMS:
        known = " or ".join(ALGORITHMS)
        raise InvalidParameter(f"Upload-Checksum is {known} and a value; it is {header[:80]!r}.", "Upload-Checksum")
    try:
        value = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != ALGORITHMS[algorithm]:
        raise InvalidParameter(
            f"Upload-Checksum is {algorithm} and {ALGORITHMS[algorithm]} bytes in base64; it is {header[:80]!r}.",
            "Upload-Checksum",
        )
    return hashlib.new(algorithm, usedforsecurity=False), value


def metadata_of(request: Request) -> tuple[str, dict[str, bytes]]:
    """Upload-Metadata as it came, and its values by their keys. Raises InvalidParameter."""
    header = request.headers.get("upload-metadata", "").strip()
    if len(header) > MAX_METADATA:
        raise InvalidParameter(f"Upload-Metadata has at most {MAX_METADATA} characters.", "Upload-Metadata")
    found: dict[str, bytes] = {}
    for pair in header.split(",") if header else ():
        key, _, encoded = pair.strip().partition(" ")
        try:
            value = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise _bad_metadata(f"the value of {key[:40]!r} is not base64") from None
        if not _KEY.fullmatch(key) or key in found:
            raise _bad_metadata(f"{key[:40]!r} is no key, or comes twice")
        found[key] = value
    return header, found


def filename_in(metadata: dict[str, bytes]) -> str | None:
    """The file's name as the client gives it, under either of the keys that clients use."""
    name = metadata.get("filename", metadata.get("name"))
    return None if name is None else name.decode(errors="replace")


def promised_sha256(metadata: dict[str, bytes]) -> str | None:
    """The digest that the client says the whole file has. Raises InvalidParameter."""
    if "sha256" not in metadata:
        return None
    promised = metadata["sha256"].decode(errors="replace").strip().lower()
    if not SHA256.fullmatch(promised):
        raise _bad_metadata("the value of 'sha256' is not 64 hexadecimal digits")
    return promised


def _bad_metadata(what: str) -> InvalidParameter:
    return InvalidParameter(
        f"Upload-Metadata is a list of `key base64-value`, joined by commas: {what}.", "Upload-Metadata"
    )


def state_of(record: ResumableRecord) -> dict[str, str]:
    """The headers that tell how far an upload is and until when it is kept."""
    return {
        "Upload-Offset": str(record.received),
        "Upload-Expires": format_datetime(record.expires_at, usegmt=True),
        "Cache-Control": "no-store",
    }
