"""Calls in a process of their own."""

from __future__ import annotations

import os

from worker.vetting.apart import apart

ROOM = 256 << 20


def test_what_it_says_comes_back() -> None:
    assert apart(lambda: "size: 320³", ROOM) == "size: 320³"
    assert apart(lambda: "", ROOM) == ""


def test_an_end_without_a_word_is_none_of_ours() -> None:
    assert apart(os.abort, ROOM) is None  # type: ignore[arg-type]  # it never returns
    assert apart(lambda: str(1 / 0), ROOM) is None
    assert apart(lambda: str(len(bytearray(2 * ROOM))), ROOM) is None
    assert apart(lambda: str(len(bytearray(ROOM // 2))), ROOM) == str(ROOM // 2)
