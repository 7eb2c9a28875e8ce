"""Thrift's compact protocol: structs written by hand, field by field, as its specification says."""

from __future__ import annotations

from typing import Any

import pytest

from worker.vetting.thrift import CutShort, Malformed, read_struct

# Field 1, i32, -1; field 2, i32, 150 (zigzag 300 = 0xAC02); field 20 by its long form, i64, 1; stop.
NUMBERS = bytes([0x15, 0x01, 0x15, 0xAC, 0x02, 0x06, 0x28, 0x02, 0x00])
# Field 5, struct {1: 7}; field 6, true; field 7, double; field 8, binary "ab"; field 9, i32, 3; stop.
MIXED = bytes([0x5C, 0x15, 0x0E, 0x00, 0x11, 0x17]) + bytes(8) + bytes([0x18, 0x02]) + b"ab" + bytes([0x15, 0x06, 0x00])
# Field 1, list of three i32; field 2, list of two booleans, a byte each; field 3, list of one struct; field 4, i32, 9.
LISTS = bytes([0x19, 0x35, 2, 4, 6, 0x19, 0x21, 1, 2, 0x19, 0x1C, 0x15, 0x02, 0x00, 0x15, 0x12, 0x00])


@pytest.mark.parametrize(
    ("data", "wanted", "fields"),
    [
        (NUMBERS, {1: "number", 2: "number", 20: "number"}, {1: -1, 2: 150, 20: 1}),
        (NUMBERS, {}, {}),
        (NUMBERS, {1: "bytes", 2: {}, 20: [{}], 3: "number"}, {}),  # fields of another type, or not there
        (MIXED, {5: {1: "number"}, 8: "bytes", 9: "number"}, {5: {1: 7}, 8: b"ab", 9: 3}),
        (MIXED, {5: {}, 6: "number", 7: "number"}, {5: {}}),
        (LISTS, {3: [{1: "number"}], 4: "number"}, {3: [{1: 1}], 4: 9}),
        (LISTS, {}, {}),
        (b"\0", {1: "number"}, {}),
    ],
)
def test_what_is_wanted_is_found_and_the_rest_is_passed_over(data: bytes, wanted: Any, fields: dict[int, Any]) -> None:
    assert read_struct(data + b"what follows", wanted) == (fields, len(data))


def test_numbers_wrap_as_in_generated_readers() -> None:
    beyond = bytes([0x15, 0x8E, 0x80, 0x80, 0x80, 0x10, 0x00])  # an i32 of 14 + 2^32, zigzag of 7
    assert read_struct(beyond, {1: "number"}) == ({1: 7}, 7)


@pytest.mark.parametrize("data", [NUMBERS, MIXED, LISTS])
def test_every_way_of_cutting_short_is_told(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(CutShort):
            read_struct(data[:length], {5: {1: "number"}, 8: "bytes"})


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x1c" * 100, Malformed),  # structs without end
        (b"\x19" * 100, Malformed),  # lists of lists without end
        (b"\x15" + b"\xff" * 20, Malformed),  # a number without end
        (b"\x1b\x00", Malformed),  # a map
        (b"\x1d\x00", Malformed),  # a kind that does not exist
        (b"\x18\xff\xff\xff\xff\x0f", CutShort),  # a string of 4 GiB
        (b"\x29\xf5\xff\xff\xff\xff\x0f", CutShort),  # a list of 4 billion numbers
        (b"\x19\xfc\xff\xff\xff\xff\x0f", CutShort),  # a list of 4 billion structs
        (b"\x19\xfc\xc1\x9a\x0c" + bytes(200_001), Malformed),  # a list of 200,000 structs and one
        (b"\x19\x15\x02", Malformed),  # numbers where structs are wanted
    ],
)
def test_hostile_structs_end_quickly(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_struct(data, {1: [{}]})
