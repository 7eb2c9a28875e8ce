"""Thrift's compact protocol, as far as a Parquet page header needs it: numbers and nested structs by field number.

Source: Apache Thrift, "Thrift Compact protocol encoding" (thrift-compact-protocol.md).
"""

from __future__ import annotations

from typing import TypeAlias

Struct: TypeAlias = "dict[int, int | Struct]"

MAX_DEPTH = 8  # a page header nests two deep
MAX_VARINT = 10  # bytes of a 64-bit number
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)


class Malformed(ValueError):
    """The bytes are no struct."""


class CutShort(Malformed):
    """The bytes end before the struct does."""


def read_struct(data: bytes) -> tuple[Struct, int]:
    """Integer and struct fields by their number, and how many bytes the struct took. Other fields are skipped.

    Raises CutShort where `data` ends within it, Malformed where it is none.
    """
    reader = _Reader(data)
    return reader.struct(0), reader.at


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int) -> Struct:
        if depth > MAX_DEPTH:
            raise Malformed(f"structs nest more than {MAX_DEPTH} deep")
        fields: Struct = {}
        number = 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            if kind in _INTEGERS:
                fields[number] = self._zigzag()
            elif kind == _STRUCT:
                fields[number] = self.struct(depth + 1)
            else:
                self._skip(kind, depth, element=False)
        return fields

    def _skip(self, kind: int, depth: int, *, element: bool) -> None:
        """Passes over one value. A boolean is a byte in a list, and part of the head elsewhere."""
        if kind in _INTEGERS:
            self._varint()
        elif kind in (_TRUE, _FALSE):
            self._take(1 if element else 0)
        elif kind == _BYTE:
            self._take(1)
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._take(self._varint())
        elif kind in (_LIST, _SET):
            self._skip_list(depth + 1)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:  # maps have no place in a page header
            raise Malformed(f"a field of the kind {kind}")

    def _skip_list(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Malformed(f"lists nest more than {MAX_DEPTH} deep")
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        if count > len(self._data):
            raise CutShort
        for _ in range(count):
            self._skip(head & 15, depth, element=True)

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

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
