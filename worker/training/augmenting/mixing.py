"""Samples mixed with others of their batch: mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from app.contract.augmentation import Cutmix, Mixup
from worker.data.batch import Batch
from worker.training.augmenting.draws import beta, uniform
from worker.training.augmenting.pictures import rectangles


def mixed(batch: Batch, mixup: Mixup | None, cutmix: Cutmix | None, classes: int, random: torch.Generator) -> Batch:
    """The batch with its samples mixed, each in one way at most, with a partner and a share of its own.

    Targets int64 [batch] become float32 [batch, classes]; those that are shares already, as of several labels, are
    mixed themselves. An attention mask shows what either sample shows. Without targets inputs alone are mixed.
    """
    count, device = len(batch), batch.inputs[0].device
    partners = torch.randperm(count, generator=random).to(device)
    way = uniform(count, random, device)
    below = 0.0 if cutmix is None else cutmix.probability
    own = torch.ones(_per_sample(count, batch.inputs[0]), device=device)
    if cutmix is not None:
        chosen = _like(way < below, batch.inputs[0])
        own = torch.where(chosen, _outside(batch.inputs[0], cutmix.alpha, random), own)
    if mixup is not None:
        chosen = _like((way >= below) & (way < below + mixup.probability), batch.inputs[0])
        own = torch.where(chosen, _like(beta(mixup.alpha, count, random, device), batch.inputs[0]), own)
    inputs = tuple(_blended(tensor, partners, own) for tensor in batch.inputs)
    share = own.flatten(1).mean(1)
    targets = None if batch.targets is None else _shared(batch.targets, partners, share, classes)
    return replace(batch, inputs=inputs, targets=targets, indices=None)


def _outside(pictures: Tensor, alpha: float, random: torch.Generator) -> Tensor:
    """float32 [batch, 1, height, width]: 0 in a rectangle, 1 elsewhere.

    Its area is the partner's share, its centre anywhere, and what lies beyond the picture is cut off.
    """
    count, (height, width) = len(pictures), pictures.shape[2:]
    side = (1 - beta(alpha, count, random, pictures.device)).sqrt()
    rows, columns = (side * height).floor(), (side * width).floor()
    middle, centre = (uniform(count, random, pictures.device) * size for size in (height, width))
    tops, lefts = (middle - rows / 2).floor(), (centre - columns / 2).floor()
    return (~rectangles(pictures, tops, lefts, rows, columns)).float()


def _blended(tensor: Tensor, partners: Tensor, own: Tensor) -> Tensor:
    """The own share of each place, and the rest of the partner's; of integers, which are masks, the larger one."""
    other = tensor[partners]
    if not tensor.is_floating_point():
        return torch.where(_like(own.flatten(1).mean(1) < 1, tensor), torch.maximum(tensor, other), tensor)
    weight = own if own.ndim == tensor.ndim else _like(own.flatten(1).mean(1), tensor)
    return (weight * tensor + (1 - weight) * other).to(tensor.dtype)


def _shared(targets: Tensor, partners: Tensor, share: Tensor, classes: int) -> Tensor:
    """float32: the own target by the sample's share, the partner's by the rest."""
    soft = targets.float() if targets.is_floating_point() else functional.one_hot(targets, classes).float()
    weight = _like(share, soft)
    return weight * soft + (1 - weight) * soft[partners]


def _per_sample(count: int, tensor: Tensor) -> list[int]:
    return [count, *[1] * (tensor.ndim - 1)]


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """[batch] with as many dimensions as the tensor."""
    return numbers.view(_per_sample(len(numbers), tensor))
