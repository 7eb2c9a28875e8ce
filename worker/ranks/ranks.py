"""What the processes of a job do together."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface
CONNECT_SECONDS = 60.0
# One rank measures and searches for as long as it likes while the others wait; the job's own time limit ends them all.
WAIT = datetime.timedelta(days=365)


class Ranks:
    """One process of `size`; `rank` counts from 0. As it stands here: a process alone."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that measures, writes and reports."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, to the last bit the same in each; `values` may be overwritten."""
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """[size, *values.shape]: what every rank gave, by rank."""
        return values.unsqueeze(0)

    def listed(self, value: T) -> list[T]:
        """What every rank gave, by rank."""
        return [value]

    def told(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first rank, the only one that calls it."""
        return work()

    def alike(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with those of the first rank."""

    def replicated(self, module: nn.Module) -> nn.Module:
        """`module` for a forward that gives a scalar; a backward sums gradients over ranks (of a module alone: its)."""
        return module

    def unsummed(self, module: nn.Module) -> AbstractContextManager[None]:
        """A forward and backward of what `replicated` gave within it leaves gradients to the next one to sum."""
        return nullcontext()


class Group(Ranks):
    """One of several processes, connected to the others by gloo, over loopback."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        """Returns once all are connected; they find each other by a file in `folder`. Raises RuntimeError."""
        self.rank, self.size = rank, size
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
        store = dist.FileStore(str(folder / "ranks"), size)  # type: ignore[attr-defined]
        wait = datetime.timedelta(seconds=CONNECT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(WAIT)

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        found = values.new_empty((self.size, *values.shape))
        dist.all_gather(list(found.unbind()), values.contiguous())
        return found

    def listed(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def told(self, work: Callable[[], T]) -> T:
        said: list[Any] = [work() if self.first else None]
        dist.broadcast_object_list(said, src=0)
        result: T = said[0]
        return result

    def alike(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            with torch.no_grad():
                dist.broadcast(tensor, src=0)

    def replicated(self, module: nn.Module) -> nn.Module:
        # Networks may have weights that a batch does not reach. Statistics are looked after by `batch_norm`.
        return DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=True)

    def unsummed(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        held: AbstractContextManager[None] = module.no_sync()
        return held
