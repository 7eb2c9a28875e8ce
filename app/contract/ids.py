"""Identifiers: a prefix that names the kind, and 26 characters that sort by the time of creation."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Literal

Prefix = Literal["mdl", "dst", "upl", "job", "key"]

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32 in lower case: no i, l, o, u to mistake
LENGTH = 26  # of 5 bits: 48 bits of milliseconds and 80 random bits, as in a ULID
RANDOM_BITS = 80
MAX_STRIDE = 1 << 64  # ids of one millisecond grow by a random stride, so that none can be guessed from another

_lock = threading.Lock()
_last = 0


def new_id(prefix: Prefix) -> str:
    """A fresh id such as `mdl_01jd3m8s5q2v7x9z4b6c8d0e2f`; later calls of one process give greater ids."""
    global _last
    with _lock:
        fresh = (time.time_ns() // 1_000_000) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
        # The clock stood still or went back: carry on from the last id instead.
        _last = fresh if fresh >> RANDOM_BITS > _last >> RANDOM_BITS else _last + 1 + secrets.randbelow(MAX_STRIDE)
        return f"{prefix}_{_encode(_last)}"


def _encode(number: int) -> str:
    return "".join(ALPHABET[number >> shift & 31] for shift in range(5 * (LENGTH - 1), -1, -5))
