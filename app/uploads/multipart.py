"""multipart/form-data (RFC 7578) as a stream: the bytes of `file` pass through, `spec` is kept, memory stays flat."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.contract.errors import InvalidRequest, UnsupportedMediaType, UploadTooLarge

FIELDS = ("file", "spec")


class Form:
    """One form with a part `file` and perhaps a part `spec`, in any order."""

    def __init__(self, content_type: str, max_spec_bytes: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise UnsupportedMediaType("The Content-Type multipart/form-data lacks its boundary.")
        self.filename: str | None = None
        self._max_spec_bytes = max_spec_bytes
        self._spec = bytearray()
        self._file: list[bytes] = []
        self._seen: set[str] = set()
        self._part: str | None = None
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._ended = False
        self._parser = self._make_parser(boundary)

    @property
    def spec(self) -> bytes | None:
        """What the part `spec` held."""
        return bytes(self._spec) if "spec" in self._seen else None

    def feed(self, piece: bytes) -> list[bytes]:
        """Takes a piece of the body and gives the bytes of `file` in it. Raises InvalidRequest, UploadTooLarge."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body cannot be read: {error}.") from None
        found, self._file = self._file, []
        return found

    def finish(self) -> None:
        """Raises InvalidRequest where the body ended early or had no part `file`."""
        if not self._ended:
            raise InvalidRequest("The multipart body ended before its closing boundary.")
        if "file" not in self._seen:
            raise InvalidRequest("The form has no part named `file`.")

    def _make_parser(self, boundary: bytes) -> MultipartParser:
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise UnsupportedMediaType(f"The boundary in the Content-Type cannot be used: {error}.") from None

    def _begin(self) -> None:
        self._disposition = b""

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition.decode("latin-1"))[1]
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in FIELDS:
            raise InvalidRequest(f"The form may have the parts `file` and `spec`; it has {name[:64]!r}.")
        if name in self._seen:
            raise InvalidRequest(f"The form has the part `{name}` twice.")
        self._seen.add(name)
        self._part = name
        if name == "file" and b"filename" in options:
            self.filename = options[b"filename"].decode(errors="replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._file.append(data[start:end])
            return
        self._spec += data[start:end]
        if len(self._spec) > self._max_spec_bytes:
            raise UploadTooLarge(f"The part `spec` is larger than {self._max_spec_bytes} bytes.")

    def _end(self) -> None:
        self._ended = True
