"""Bytes of the header, written and read: numbers of any size, strings, and nothing that is taken on trust."""

from __future__ import annotations

from app.contract.errors import PackedDamaged

Damaged = PackedDamaged

VARINT_BYTES = 9  # 63 bits are more than any size that a machine can hold


class Writer:
    """Appends."""

    def __init__(self) -> None:
        self.data = bytearray()

    def number(self, value: int) -> None:
        """An unsigned number, seven bits a byte, the lowest first (LEB128)."""
        assert value >= 0
        while value >= 0x80:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def raw(self, value: bytes) -> None:
        self.data += value

    def string(self, value: str) -> None:
        encoded = value.encode()
        self.number(len(encoded))
        self.raw(encoded)


class Reader:
    """Reads what a Writer wrote. Raises Damaged where it ends too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self._at

    def number(self, most: int) -> int:
        """A number of at most `most`."""
        value = 0
        for place in range(VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        else:
            raise Damaged("A number in the header is too long. The file is damaged: fetch it again.")
        if value > most:
            raise Damaged(f"A number in the header is {value}, where at most {most} can be. The file is damaged.")
        return value

    def byte(self) -> int:
        return self.raw(1)[0]

    def raw(self, count: int) -> memoryview:
        if count > self.left:
            raise Damaged("The header ends too early. The file is damaged or cut off: fetch it again.")
        self._at += count
        return self._data[self._at - count : self._at]

    def string(self, most: int) -> str:
        try:
            return bytes(self.raw(self.number(most))).decode()
        except UnicodeDecodeError:
            raise Damaged("A name in the header is no text. The file is damaged: fetch it again.") from None
