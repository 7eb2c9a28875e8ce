"""Pictures: the folder's image processor, or a plain one made of config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
from torch import Tensor
from transformers import AutoImageProcessor

from app.contract.errors import DatasetMismatch, ModelRejected
from app.contract.facts import TensorFacts
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.data.pictures import to_tensor
from worker.loading.feeding.base import Feeding, arrays, wrong_kind
from worker.loading.folder import PREPROCESSOR, Folder
from worker.objectives.base import Task
from worker.vetting.boundary import first_line

PIXELS = "pixel_values"
# A picture of no particular size, to find out which size a processor makes.
_PROBE = (300, 200)


def image_feeding(folder: Folder, module: Any, task: Task) -> Feeding:
    """The folder's image processor; without one, pictures are resized to `config.image_size` and divided by 255."""
    pixels = _processor(folder) if folder.has(PREPROCESSOR) else _plain_pixels(module.config)
    shape: tuple[int | None, ...]
    if folder.has(PREPROCESSOR):
        shape = tuple(pixels([new_image("RGB", _PROBE)]).shape[1:])
    else:
        shape = _plain_shape(module.config)

    def encode(raw: RawBatch) -> Inputs:
        if isinstance(raw.inputs, dict):
            return arrays(raw.inputs, ((PIXELS, torch.float32),))
        pictures = [image for image in raw.inputs if isinstance(image, Image)]
        if len(pictures) != len(raw.inputs):
            raise wrong_kind("pictures")
        return (pixels(pictures),)

    facts = TensorFacts(name=PIXELS, shape=shape, dtype="float32")
    return Feeding(("arrays", "images"), (facts,), encode, task)


def _processor(folder: Folder) -> Callable[[list[Image]], Tensor]:
    try:
        processor = AutoImageProcessor.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as failure:  # processors raise errors of every class
        raise ModelRejected(f"{PREPROCESSOR!r} of the folder cannot be used: {first_line(failure)}") from failure

    def pixels(pictures: list[Image]) -> Tensor:
        batch: Tensor = processor(images=[image.convert("RGB") for image in pictures], return_tensors="pt")[PIXELS]
        return batch.to(torch.float32)

    return pixels


def _plain_shape(config: Any) -> tuple[int | None, ...]:
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (getattr(config, "num_channels", 3), height, width)


def _plain_pixels(config: Any) -> Callable[[list[Image]], Tensor]:
    shape = _plain_shape(config)
    _, height, width = shape

    def pixels(pictures: list[Image]) -> Tensor:
        if height is not None and width is not None:
            pictures = [image.resize((width, height), Resampling.BILINEAR) for image in pictures]
        elif len({image.size for image in pictures}) > 1:
            raise DatasetMismatch(
                "The pictures have different sizes, and neither config.json nor a preprocessor_config.json says what "
                "to resize them to. Resize them before the upload, or add the preprocessor to the folder.",
                pointer="/dataset",
            )
        return torch.stack([to_tensor(image, shape) for image in pictures])

    return pixels
