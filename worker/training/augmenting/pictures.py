"""Pictures float [batch, channels, height, width], each changed in its own way; any range or normalization will do."""

from __future__ import annotations

import torch
from torch import Tensor

from app.contract.augmentation import Crop, Erase, Flip, Jitter
from app.contract.errors import InvalidSpec
from worker.training.augmenting.draws import uniform, whole


def flipped(pictures: Tensor, options: Flip, random: torch.Generator) -> Tensor:
    """Mirrored left to right and top to bottom, each with its probability."""
    for probability, axis in ((options.horizontal, 3), (options.vertical, 2)):
        if probability:
            chosen = uniform(len(pictures), random, pictures.device) < probability
            pictures = torch.where(chosen[:, None, None, None], pictures.flip(axis), pictures)
    return pictures


def cropped(pictures: Tensor, options: Crop, random: torch.Generator) -> Tensor:
    """Windows of the old size out of padded pictures, at offsets of 0 to twice the padding.

    Raises InvalidSpec for a padding as large as a side.
    """
    _, _, height, width = pictures.shape
    if options.padding >= min(height, width):
        raise InvalidSpec(
            f"crop has a padding of {options.padding} pixels, and the pictures of a batch {height} x {width}: "
            "give fewer than a side has."
        )
    for axis in (2, 3):
        pictures = _shifted(pictures, axis, options, random)
    return pictures


def _shifted(pictures: Tensor, axis: int, options: Crop, random: torch.Generator) -> Tensor:
    """Moved along one axis by up to the padding either way."""
    size = pictures.shape[axis]
    offsets = whole(uniform(len(pictures), random, pictures.device), 2 * options.padding) - options.padding
    places = torch.arange(size, device=pictures.device) + offsets[:, None]
    shown = (places >= 0) & (places < size)
    if options.fill == "reflect":
        places = places.abs()
        places = torch.where(places < size, places, 2 * (size - 1) - places)
    view = [len(pictures), 1, 1, 1]
    view[axis] = size
    index = places.clamp(0, size - 1).view(view).expand(pictures.shape)
    moved = pictures.gather(axis, index)
    return moved * shown.view(view) if options.fill == "zero" else moved


def jittered(pictures: Tensor, options: Jitter, random: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, in this order. What is not asked for draws no numbers.

    All three are relative to the picture itself, so that a picture that was normalized changes as the raw one would.
    """

    def factors(amount: float) -> Tensor:
        """Uniform in [-amount, amount], [batch, 1, 1, 1]."""
        return amount * (2 * uniform(len(pictures), random, pictures.device)[:, None, None, None] - 1)

    if options.brightness:
        pictures = pictures + factors(options.brightness) * pictures.std((1, 2, 3), correction=0, keepdim=True)
    if options.contrast:
        pictures = _scaled(pictures, pictures.mean((1, 2, 3), keepdim=True), factors(options.contrast))
    if options.saturation:
        pictures = _scaled(pictures, pictures.mean(1, keepdim=True), factors(options.saturation))
    return pictures


def _scaled(pictures: Tensor, middle: Tensor, change: Tensor) -> Tensor:
    """Differences to the middle, 1 + change times as large."""
    return middle + (1 + change) * (pictures - middle)


def erased(pictures: Tensor, options: Erase, random: torch.Generator) -> Tensor:
    """Rectangles within the picture, of no more than the largest area (but one pixel), painted over.

    The shape is uniform in area and in the logarithm of height over width, as far as it fits.
    """
    count, _, height, width = pictures.shape
    chosen, shares, shapes, tops, lefts = (uniform(count, random, pictures.device) for _ in range(5))
    area = _between(options.area, shares) * (height * width)
    aspect = _between(options.aspect, shapes, logarithmic=True)
    rows = (area * aspect).sqrt().floor().clamp(1, height)
    columns = (area / rows).floor().clamp(1, width)
    box = rectangles(pictures, whole(tops, height - rows), whole(lefts, width - columns), rows, columns)
    painted = box & (chosen < options.probability)[:, None, None, None]
    return torch.where(painted, _paint(pictures, options, random), pictures)


def _between(bounds: tuple[float, float], numbers: Tensor, *, logarithmic: bool = False) -> Tensor:
    """Uniform numbers in [0, 1) as numbers between the bounds."""
    least, largest = bounds
    return least * (largest / least) ** numbers if logarithmic else least + (largest - least) * numbers


def rectangles(pictures: Tensor, tops: Tensor, lefts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Where the rectangles are, bool [batch, 1, height, width]; all are [batch], in pixels."""
    down, across = (torch.arange(size, device=pictures.device) for size in pictures.shape[2:])
    vertical = (down >= tops[:, None]) & (down < (tops + rows)[:, None])
    horizontal = (across >= lefts[:, None]) & (across < (lefts + columns)[:, None])
    return vertical[:, None, :, None] & horizontal[:, None, None, :]


def _paint(pictures: Tensor, options: Erase, random: torch.Generator) -> Tensor:
    if options.fill == "zero":
        return torch.zeros_like(pictures)
    means = pictures.mean((2, 3), keepdim=True)
    if options.fill == "mean":
        return means.expand_as(pictures)
    noise = torch.randn(pictures.shape, generator=random).to(pictures)
    return means + noise * pictures.std((2, 3), correction=0, keepdim=True)
