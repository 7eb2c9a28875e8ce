"""How many threads share an operation, where that is not left to torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """So many, in what runs inside.

    One, for loops over thousands of small operations: threads gain little there, and where the machine does other work
    besides, each operation waits for the thread that has no core. GPTQ of a layer of 1536 x 384 took 0.9 s with one
    thread and 10 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
