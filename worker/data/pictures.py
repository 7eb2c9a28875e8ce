"""Pictures: decoded with explicit formats and a pixel cap, and as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.contract.errors import DatasetMismatch, DatasetRejected

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
MAX_PIXELS = 64_000_000  # of one picture; the largest cameras have about 60 million
_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def open_picture(stream: IO[bytes], name: str) -> Image.Image:
    """A picture whose header was read, not yet its pixels. Raises DatasetRejected, naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the cap below is an error
            image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as failure:  # Pillow's own cap is higher
        raise DatasetRejected(f"{name!r} has more than {MAX_PIXELS} pixels: make it smaller.") from failure
    except Exception as failure:  # damaged headers raise errors of a dozen classes
        raise DatasetRejected(f"{name!r} is no readable picture; {', '.join(FORMATS)} are taken.") from failure
    if image.width * image.height > MAX_PIXELS:
        raise DatasetRejected(f"{name!r} has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are taken.")
    if image.mode not in _GREY | _COLOUR:
        raise DatasetRejected(f"{name!r} has pixels of mode {image.mode}; save it with 8 bits a channel.")
    return image


def decode(image: Image.Image, name: str) -> Image.Image:
    """All pixels, as mode L where the picture is grey, else RGB. Raises DatasetRejected where they cannot be read."""
    try:
        return image.convert("L" if image.mode in _GREY else "RGB")
    except Exception as failure:  # truncated and damaged data raise errors of a dozen classes
        raise DatasetRejected(f"{name!r} is damaged or was cut short: its pixels cannot be read.") from failure


def channels(image: Image.Image) -> int:
    """1 for grey, 3 for colour."""
    return 1 if image.mode in _GREY else 3


def to_tensor(image: Image.Image, shape: Sequence[int | None]) -> Tensor:
    """float32 [channels, height, width] in [0, 1], in the channel count of `shape`; None leaves a size open.

    Raises DatasetMismatch where height or width differ from `shape`: nothing is resized behind the client's back.
    """
    wanted = tuple(shape[1:])
    given = (image.height, image.width)
    if any(size is not None and size != own for size, own in zip(wanted, given, strict=True)):
        raise DatasetMismatch(
            f"A picture has {given[0]} x {given[1]} pixels (height x width) and the model takes {wanted[0]} x "
            f"{wanted[1]}. Resize the pictures before the upload.",
            pointer="/dataset",
        )
    pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"), dtype=np.float32) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)))
