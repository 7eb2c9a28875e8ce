"""How samples become the inputs of a model that only says shapes: arrays as they are, pictures scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from PIL.Image import Image
from torch import Tensor

from app.contract.errors import DatasetMismatch
from app.contract.facts import DataKind, Task, TensorFacts
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.data.pictures import to_tensor

_PICTURE_CHANNELS = (1, 3)
_PICTURE_TASKS = ("image-classification", "multi-label", "regression")


def accepted(task: Task, inputs: tuple[TensorFacts, ...]) -> tuple[DataKind, ...]:
    """Arrays, and pictures where the one input is float32 [1 or 3, height, width]."""
    shape = inputs[0].shape
    picture = len(inputs) == 1 and inputs[0].dtype == "float32" and len(shape) == 3 and shape[0] in _PICTURE_CHANNELS
    return ("arrays", "images") if picture and task in _PICTURE_TASKS else ("arrays",)


def encoder(inputs: tuple[TensorFacts, ...], vocabularies: Mapping[str, int]) -> Callable[[RawBatch], Inputs]:
    """Arrays in the dtypes of `inputs`, in their order; pictures in the channels of the one input, divided by 255.

    `vocabularies` says how many ids an input's embedding knows. The result raises DatasetMismatch.
    """

    def encode(raw: RawBatch) -> Inputs:
        if isinstance(raw.inputs, dict):
            return tuple(_array(raw.inputs, tensor, vocabularies, alone=len(inputs) == 1) for tensor in inputs)
        if raw.inputs and not isinstance(raw.inputs[0], Image):
            raise DatasetMismatch("The model takes arrays: upload token ids instead of text.", pointer="/dataset")
        shape = inputs[0].shape
        pictures = [to_tensor(image, shape) for image in raw.inputs if isinstance(image, Image)]
        if len({picture.shape for picture in pictures}) > 1:
            raise DatasetMismatch(
                "The pictures have different sizes, and the model does not say what to resize them to. Resize them "
                "before the upload.",
                pointer="/dataset",
            )
        return (torch.stack(pictures),)

    return encode


def _array(
    arrays: Mapping[str, Tensor], wanted: TensorFacts, vocabularies: Mapping[str, int], *, alone: bool
) -> Tensor:
    """An input by its name; where there is only one, by whatever name it came."""
    tensor = next(iter(arrays.values())) if alone and wanted.name not in arrays else arrays[wanted.name]
    _check_ids(tensor, vocabularies.get(wanted.name))
    return tensor.to(getattr(torch, wanted.dtype))


def _check_ids(tensor: Tensor, vocabulary: int | None) -> None:
    if vocabulary is None or tensor.numel() == 0:
        return
    low, high = (int(value) for value in tensor.aminmax())
    if low < 0 or high >= vocabulary:
        raise DatasetMismatch(
            f"The dataset holds token ids from {low} to {high}; the model's embedding knows 0 to {vocabulary - 1}.",
            pointer="/dataset",
        )
