"""Weights, gradients and the optimizer's state shared out among ranks while they train: torch's FSDP2.

Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023. A copy of the module is trained, whose parameters are DTensors; the
module itself holds none meanwhile, and gets them back at the end, so that nothing else has to know.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from app.contract.errors import Unsupported
from worker.ranks.ranks import Ranks

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20


class Shards:
    """A module that is shared out. `module` is what is trained; every rank has to call everything equally often."""

    def __init__(self, whole: nn.Module, ranks: Ranks) -> None:
        """Raises Unsupported for networks that hold on to their weights in other ways."""
        _check(whole)
        _return_what_is_freed()
        self._whole = whole
        for parameter in whole.parameters():
            parameter.data = parameter.data.contiguous()  # of a transposed one, FSDP takes no share
        # Its parameters are the same objects, until each is replaced by its share.
        self.module = copy.deepcopy(whole, {id(parameter): parameter for parameter in whole.parameters()})
        mesh = init_device_mesh("cpu", (ranks.size,))
        for block in _blocks(self.module):
            fully_shard(block, mesh=mesh)
        # By default the outermost keeps its weights together until a backward, which not every forward has.
        fully_shard(self.module, mesh=mesh, reshard_after_forward=True)
        self._release()

    @contextmanager
    def unsummed(self) -> Iterator[None]:
        """Gradients of passes within it are summed over ranks with those of the next pass."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    @contextmanager
    def filled(self) -> Iterator[nn.Module]:
        """The module itself with its weights as they are now, in the mode of the other one."""
        self.fill()
        try:
            yield self._whole.train(self.module.training)
        finally:
            self._release()

    def fill(self) -> None:
        """Gives the module itself its weights and statistics."""
        with torch.no_grad():
            for own, share in zip(self._whole.parameters(), self.module.parameters(), strict=True):
                assert isinstance(share, DTensor)
                own.data = share.full_tensor().detach()
            for buffer, other in zip(self._whole.buffers(), self.module.buffers(), strict=True):
                buffer.copy_(other)

    def _release(self) -> None:
        for parameter in self._whole.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of stacks: their weights are brought together one after the other."""
    stacks = [each for each in module.modules() if type(each) is nn.ModuleList]
    found = [block for stack in stacks if len(stack) > 1 for block in stack]
    # A stack within a block, as of experts, is part of it.
    inner = {id(each) for block in found for each in block.modules() if each is not block}
    return [block for block in found if id(block) not in inner and any(True for _ in block.parameters())]


def _return_what_is_freed() -> None:
    """From now on the C library gives large blocks of memory back to the system as soon as they are freed.

    By itself glibc keeps those of the size that was freed before, in pieces: gathered weights of layers, measured on 85
    million parameters, added up to twice what sharing out had saved.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, and do so anyway
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _check(module: nn.Module) -> None:
    if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
        raise Unsupported(
            "Recurrent layers hold on to their weights in a way of their own, and cannot be sharded. Leave sharded out."
        )


def gathered(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """The state with whole tensors in the place of shared-out ones, one after the other; without them unless `keep`."""
    found = {}
    for name, value in state.items():
        if not isinstance(value, DTensor):
            found[name] = value
            continue
        whole = value.full_tensor()
        if keep:
            found[name] = whole
    return found


def alike(value: Tensor, pattern: Tensor) -> Tensor:
    """This rank's share of a whole tensor where `pattern`, of its shape, is shared out; else the tensor."""
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    held: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held
