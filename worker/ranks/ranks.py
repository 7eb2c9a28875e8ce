"""What the processes of a job do together."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from worker.ranks.lines import Lines
from worker.ranks.meeting import Meeting, Place
from worker.ranks.remote import Remote
from worker.scratch import CARDS

T = TypeVar("T")

SMALL_BYTES = 1 << 19  # beyond, gloo's ring is as fast
PACK_BYTES = 1 << 24
# One rank measures and searches for as long as it likes while the others wait; the job's own time limit ends them all.
WAIT = datetime.timedelta(days=365)


class Ranks:
    """One process of `size`, `beside` of them on one host; `rank` counts from 0. As it stands here: a process alone."""

    rank = 0
    size = 1
    beside = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that measures, writes and reports."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first one of its host, which writes what those beside it read."""
        return self.rank % self.beside == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, to the last bit the same in each; for a few values."""
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

    def part(self) -> None:
        """Returns when all have come here: whoever ends before may take with it what another has still to read."""


def _mean(ranks: Ranks, bucket: Any) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's mean of a bucket of gradients; a large one travels while the backward goes on."""
    mine: Tensor = bucket.buffer()
    if mine.nbytes > SMALL_BYTES:
        ring = dist.all_reduce(mine.div_(ranks.size), async_op=True)
        return ring.get_future().then(lambda done: done.value()[0])
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(ranks.gathered(mine).mean(0))
    return done


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _packed(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype together, up to some size: a message each would take longer."""
    packed: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        own = packed.setdefault(tensor.dtype, [])
        own.append(tensor)
        if sum(one.nbytes for one in own) > PACK_BYTES:
            yield packed.pop(tensor.dtype)
    yield from packed.values()


class Group(Ranks):
    """One of several processes, connected to the others by gloo, and by lines for what is small."""

    def __init__(self, rank: int, place: Place, beside: Mapping[int, socket.socket]) -> None:
        """Returns once all are connected; `beside`: lines to those of the same host. Raises RuntimeError, OSError."""
        self.rank, self.size, self.beside = rank, place.size, place.processes
        os.environ["GLOO_SOCKET_IFNAME"] = place.interface
        store = Meeting(place.folder / CARDS, place.others)
        # First the lines: unlike gloo they try again where a host cannot be reached at once.
        remote = Remote(rank, place, store).connected() if place.hosts > 1 else {}
        wait = datetime.timedelta(seconds=place.patience)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size, timeout=wait)
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(WAIT)
        self._lines = Lines({**beside, **remote})

    def total(self, values: Tensor) -> Tensor:
        return self.gathered(values).sum(0)  # sooner than by gloo's all_reduce, which takes several turns

    def gathered(self, values: Tensor) -> Tensor:
        found = values.new_empty((self.size, *values.shape))
        values = values.contiguous()
        if values.nbytes > SMALL_BYTES:
            dist.all_gather(list(found.unbind()), values)
            return found
        found[self.rank] = values
        for rank, said in self._lines.exchanged(_bytes(values)).items():
            _bytes(found[rank])[:] = said
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

    def part(self) -> None:
        self.gathered(torch.zeros(1))  # by lines, on which nothing else is then under way

    def alike(self, tensors: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for packed in _packed(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in packed])
                dist.broadcast(flat, src=0)
                if not self.first:
                    for tensor, found in zip(packed, flat.split([one.numel() for one in packed]), strict=True):
                        tensor.copy_(found.view_as(tensor))

    def replicated(self, module: nn.Module) -> nn.Module:
        # Networks may have weights that a batch does not reach. Statistics are looked after by `batch_norm`.
        made = DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=True)
        made.register_comm_hook(self, lambda ranks, bucket: _mean(ranks, bucket))  # reads no postponed annotations
        return made

    def unsummed(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        held: AbstractContextManager[None] = module.no_sync()
        return held
