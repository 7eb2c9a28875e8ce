"""The random numbers of a process: torch's, NumPy's (augmentation of speech models draws them) and Python's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from worker.training.states import State, Unusable


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All generators begin at the seed; afterwards they stand where they stood before."""
    before = random_state(device)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        load_random(before, device)


def random_state(device: torch.device) -> State:
    """Where the generators stand."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "python": list(random.getstate()),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random(state: State, device: torch.device) -> None:
    """Puts the generators there. Raises Unusable for what is no such state."""
    try:
        torch.set_rng_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        version, numbers, cached = state["python"]
        random.setstate((version, tuple(numbers), cached))
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Unusable("its random state cannot be taken up") from error
