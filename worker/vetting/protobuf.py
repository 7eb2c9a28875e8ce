"""The outline of a protobuf message, walked before any library parses it: two bytes of a file can ask for a hundred of
memory, and a message inside a message inside a message for the whole stack."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from app.contract.errors import TersorError

MAX_DEPTH = 64  # messages in messages; ten levels of subgraphs have about 30
MAX_FIELDS = 4_000_000  # of all messages; a network of 20,000 nodes with long metadata has below one million
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SKIPPED = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT = 10  # bytes


def check_message(data: bytes, descriptor: Any, error: type[TersorError]) -> None:
    """Raises `error` unless `data` is a well-formed message of that type within MAX_DEPTH and MAX_FIELDS.

    `descriptor` is a protobuf Descriptor; fields that it does not know are walked over. Strings have to be UTF-8: the
    parser gives others as bytes, which no reader expects.
    """
    pending = [(0, len(data), descriptor, 1)]
    fields = 0
    while pending:
        position, end, kind, depth = pending.pop()
        inner, strings = _submessages(kind), _strings(kind)
        while position < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise error(f"The file describes more than {MAX_FIELDS} things (nodes, names, numbers beside weights).")
            tag, position = _varint(data, position, end, error)
            wire, number = tag & 7, tag >> 3
            if wire == _VARINT:
                _, position = _varint(data, position, end, error)
            elif wire in _SKIPPED:
                position += _SKIPPED[wire]
            elif wire == _BYTES:
                length, position = _varint(data, position, end, error)
                if number in inner and position + length <= end:
                    if depth == MAX_DEPTH:
                        raise error(f"The file nests its parts more than {MAX_DEPTH} deep; no network needs that.")
                    pending.append((position, position + length, inner[number], depth + 1))
                elif number in strings:
                    _check_text(data[position : position + length], error)
                position += length
            else:
                raise _damaged(error)
            if position > end:
                raise _damaged(error)


def _varint(data: bytes, position: int, end: int, error: type[TersorError]) -> tuple[int, int]:
    """The number at `position` and where it ends."""
    value = shift = 0
    for index in range(position, min(end, position + _MAX_VARINT)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise _damaged(error)


@lru_cache(maxsize=64)
def _submessages(descriptor: Any) -> dict[int, Any]:
    return {field.number: field.message_type for field in descriptor.fields if field.message_type is not None}


@lru_cache(maxsize=64)
def _strings(descriptor: Any) -> frozenset[int]:
    return frozenset(field.number for field in descriptor.fields if field.type == field.TYPE_STRING)


def _check_text(text: bytes, error: type[TersorError]) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as failure:
        raise error("The file is damaged: a name in it is not UTF-8. Export it again.") from failure


def _damaged(error: type[TersorError]) -> TersorError:
    return error("The file is damaged or was cut short: its parts do not end where they say. Export it again.")
