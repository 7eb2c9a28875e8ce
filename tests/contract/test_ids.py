from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

from app.contract import ids
from app.contract.ids import new_id


def test_ids_have_the_shape_that_specs_ask_for() -> None:
    assert re.fullmatch(r"mdl_[0-9a-z]{26}", new_id("mdl"))


def test_ids_of_one_process_grow_and_differ() -> None:
    made = [new_id("job") for _ in range(5000)]
    assert made == sorted(set(made))


def test_ids_of_many_threads_differ() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_id("job"), range(4000)))
    assert len(set(made)) == 4000


def test_the_first_ten_characters_are_the_milliseconds() -> None:
    before = time.time_ns() // 1_000_000
    text = new_id("job")[4:]
    number = 0
    for character in text:
        number = number * 32 + "0123456789abcdefghjkmnpqrstvwxyz".index(character)
    # Ids made faster than one a millisecond borrow from the random part, which never reaches the clock.
    assert abs((number >> 80) - before) < 1000


def test_a_clock_that_goes_back_does_not_make_ids_smaller(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    first = new_id("job")
    monkeypatch.setattr(ids.time, "time_ns", lambda: 0)
    assert new_id("job") > first
