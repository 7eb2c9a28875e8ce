"""What a feeding is, and arrays as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.contract.errors import DatasetMismatch
from app.contract.facts import DataKind, TensorFacts
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.model import EXAMPLE_LENGTH
from worker.objectives.base import Task


@dataclass(frozen=True)
class Feeding:
    """What a model takes, how raw samples become that, and the task that its outputs are for.

    `example_length` is a length that any open dimension of the inputs can have.
    """

    accepts: tuple[DataKind, ...]
    inputs: tuple[TensorFacts, ...]
    encode: Callable[[RawBatch], Inputs]
    task: Task
    example_length: int = EXAMPLE_LENGTH


def arrays(inputs: dict[str, Tensor], wanted: Iterable[tuple[str, torch.dtype]]) -> Inputs:
    """Arrays by the model's names for its inputs; a single array whatever its name."""
    pairs = list(wanted)
    if len(pairs) == len(inputs) == 1:
        return (next(iter(inputs.values())).to(pairs[0][1]),)
    return tuple(inputs[name].to(dtype) for name, dtype in pairs)


def wrong_kind(wanted: str) -> DatasetMismatch:
    """The refusal of samples of another kind than the model takes."""
    return DatasetMismatch(f"The model takes {wanted}; the dataset holds samples of another kind.", pointer="/dataset")
