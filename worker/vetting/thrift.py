"""Thrift's compact protocol, as far as Parquet's footers and page headers need it: chosen fields by their number.

Numbers wrap as they do in the generated readers of C++, so that both see the same.
Source: Apache Thrift, "Thrift Compact protocol encoding" (thrift-compact-protocol.md).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

Wanted: TypeAlias = "dict[int, Literal['number', 'bytes'] | Wanted | list[Wanted]]"
"""Which fields of a struct are kept: numbers, byte strings, structs, and lists of structs."""

MAX_DEPTH = 16  # a footer nests seven deep
MAX_KEPT = 200_000  # structs of lists: columns times row groups of the largest published files are below 50,000
MAX_VARINT = 10  # bytes of a 64-bit number
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_BITS = {_I16: 32, _I32: 32, _I64: 64}


class Malformed(ValueError):
    """The bytes are no struct."""


class CutShort(Malformed):
    """The bytes end before the struct does."""


def read_struct(data: bytes, wanted: Wanted) -> tuple[dict[int, Any], int]:
    """The wanted fields that are there and of that type, and how many bytes the struct took.

    Raises CutShort where `data` ends within it, Malformed where it is none.
    """
    reader = _Reader(data)
    return reader.struct(wanted, 0), reader.at


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._kept = 0
        self.at = 0

    def struct(self, wanted: Wanted, depth: int) -> dict[int, Any]:
        if depth > MAX_DEPTH:
            raise Malformed(f"structs nest more than {MAX_DEPTH} deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._number(_I16)
            kind, want = head & 15, wanted.get(number)
            if want == "number" and kind in _BITS:
                fields[number] = self._number(kind)
            elif want == "bytes" and kind == _BINARY:
                size = self._varint()
                self._take(size)
                fields[number] = self._data[self.at - size : self.at]
            elif isinstance(want, dict) and kind == _STRUCT:
                fields[number] = self.struct(want, depth + 1)
            elif isinstance(want, list) and kind == _LIST:
                fields[number] = self._list(want[0], depth + 1)
            else:
                self._skip(kind, depth, element=False)
        return fields

    def _list(self, wanted: Wanted, depth: int) -> list[dict[int, Any]]:
        count, kind = self._list_head()
        if kind != _STRUCT and count:
            raise Malformed("a list of another kind than structs")
        self._kept += count
        if self._kept > MAX_KEPT:
            raise Malformed(f"more than {MAX_KEPT} entries")
        return [self.struct(wanted, depth) for _ in range(count)]

    def _skip(self, kind: int, depth: int, *, element: bool) -> None:
        """Passes over one value. A boolean is a byte in a list, and part of the head elsewhere."""
        if kind in _BITS:
            self._varint()
        elif kind in (_TRUE, _FALSE):
            self._take(1 if element else 0)
        elif kind == _BYTE:
            self._take(1)
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._take(self._varint())
        elif kind in (_LIST, _SET) and depth <= MAX_DEPTH:
            count, inner = self._list_head()
            for _ in range(count):
                self._skip(inner, depth + 1, element=True)
        elif kind == _STRUCT:
            self.struct({}, depth + 1)
        else:  # maps are not part of Parquet
            raise Malformed(f"a field of the kind {kind}")

    def _list_head(self) -> tuple[int, int]:
        """Length of a list and the kind of its elements, each of which takes a byte or more."""
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        if count > len(self._data) - self.at:
            raise CutShort
        return count, head & 15

    def _byte(self) -> int:
        self._take(1)
        return self._data[self.at - 1]

    def _take(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise CutShort

    def _varint(self) -> int:
        value = 0
        for index in range(MAX_VARINT):
            byte = self._byte()
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                return value
        raise Malformed("a number of more than 64 bits")

    def _number(self, kind: int) -> int:
        value = self._varint() & ((1 << _BITS[kind]) - 1)
        return (value >> 1) ^ -(value & 1)
