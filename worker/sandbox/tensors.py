"""Tensors between the processes of a job: by value.

torch passes them by file descriptor, for which the receiver connects to a socket of the sender. Inside the sandbox
nothing connects to anything, so a tensor's bytes go through the queue itself, as a NumPy array's do.
"""

from __future__ import annotations

import sys
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def share_by_value() -> None:
    """Holds for this process and its forks. Does nothing where torch was not loaded before the sandbox was entered."""
    if "torch" not in sys.modules:
        return
    import torch
    import torch.multiprocessing  # registers its own way first, which this one replaces

    ForkingPickler.register(torch.UntypedStorage, _reduce)


def _reduce(storage: torch.UntypedStorage) -> tuple[Any, tuple[bytes]]:
    import torch

    flat = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
    return _rebuild, (flat.numpy().tobytes(),)


def _rebuild(content: bytes) -> torch.UntypedStorage:
    import torch

    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
