"""Image folders in a zip or tar: `<split>/<label>/<picture>`, or `<split>/<picture>` without labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL.Image import Image

from app.contract.errors import DatasetRejected
from app.contract.facts import SPLITS, DatasetFacts, SplitFacts, TensorFacts
from worker.data.base import Data, RawBatch, Split
from worker.data.pictures import channels, decode, open_picture
from worker.vetting.archive import Archive, Member

INPUT = "image"
EXPECTED = (
    "Expected are pictures at <split>/<label>/<name>.png (or .jpg, .bmp, .webp) with split train, validation, test or "
    "calibration; without labels at <split>/<name>.png."
)
MAX_FILE_BYTES = 256 << 20
# Pixels that are decoded in full while a dataset is opened, about 3 s of work; of later pictures the header is read.
DECODED_PIXELS = 1 << 28
_PICTURE = re.compile(r".+\.(png|jpe?g|bmp|webp)", re.IGNORECASE)
_OTHER_PICTURE = re.compile(r".+\.(gif|tiff?|hei[cf]|avif|jp2|svg|raw|ppm|pgm)", re.IGNORECASE)


class ImageSplit:
    """A split of pictures; `read` decodes the pictures of one batch."""

    def __init__(self, members: list[Member], targets: list[int] | None) -> None:
        self.members = members
        self.targets = targets
        self.has_targets = targets is not None

    def __len__(self) -> int:
        return len(self.members)

    def read(self, indices: Sequence[int]) -> RawBatch:
        pictures = [_read(self.members[index]) for index in indices]
        targets = None if self.targets is None else torch.tensor([self.targets[index] for index in indices])
        return RawBatch(pictures, targets)


def open_images(archive: Archive) -> Data:
    """Describes the pictures of an archive, which stays open as long as the data. Raises DatasetRejected by name.

    Every header is read, and pixels are decoded up to a budget.
    """
    found: dict[str, dict[Member, str | None]] = {}
    for name, member in archive.members.items():
        if _OTHER_PICTURE.fullmatch(name):
            raise DatasetRejected(f"{name!r} is no PNG, JPEG, BMP or WebP picture. {EXPECTED}")
        if not _PICTURE.fullmatch(name):
            continue  # a readme, a licence, a list of classes
        split, label = _place(name)
        found.setdefault(split, {})[member] = label
    if not found:
        raise DatasetRejected(
            f"The archive holds no pictures; its first files are {', '.join(map(repr, list(archive.members)[:3]))}. "
            f"{EXPECTED}"
        )
    labels = _labels({label for members in found.values() for label in members.values() if label is not None})
    splits = {name: _split(name, found[name], labels) for name in SPLITS if name in found}
    budget = [DECODED_PIXELS]
    facts = {name: _facts(split, budget) for name, split in splits.items()}
    opened: dict[str, Split] = {**splits}
    return Data(DatasetFacts(kind="images", splits=facts, labels=labels or None), opened)


def _place(name: str) -> tuple[str, str | None]:
    """Split and label of a path."""
    parts = name.split("/")
    if parts[0] not in SPLITS or len(parts) not in (2, 3):
        raise DatasetRejected(f"The archive holds {name!r}. {EXPECTED}")
    return parts[0], parts[1] if len(parts) == 3 else None


def _labels(names: set[str]) -> tuple[str, ...]:
    """In order: numerically where all are numbers, so that class 10 follows class 9."""
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def _split(name: str, members: dict[Member, str | None], labels: tuple[str, ...]) -> ImageSplit:
    numbers = {label: number for number, label in enumerate(labels)}
    targets = [numbers[label] for label in members.values() if label is not None]
    if targets and len(targets) != len(members):
        bare = next(member.name for member, label in members.items() if label is None)
        raise DatasetRejected(f"Split {name!r} has labels, but {bare!r} lies in no label's folder. {EXPECTED}")
    return ImageSplit(list(members), targets or None)


def _facts(split: ImageSplit, budget: list[int]) -> SplitFacts:
    shapes = {_check(member, budget) for member in split.members}
    columns = zip(*shapes, strict=True)
    shape = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in columns)
    return SplitFacts(
        samples=len(split),
        inputs=(TensorFacts(name=INPUT, shape=shape, dtype="uint8"),),
        targets="classes" if split.has_targets else None,
        target_min=min(split.targets) if split.targets else None,
        target_max=max(split.targets) if split.targets else None,
    )


def _check(member: Member, budget: list[int]) -> tuple[int, int, int]:
    """Channels, height and width of a picture; decodes it while the budget of pixels lasts."""
    _check_size(member)
    with member.open() as stream:
        image = open_picture(stream, member.name)
        budget[0] -= image.width * image.height
        if budget[0] >= 0:
            decode(image, member.name)
        return channels(image), image.height, image.width


def _read(member: Member) -> Image:
    _check_size(member)
    with member.open() as stream:
        return decode(open_picture(stream, member.name), member.name)


def _check_size(member: Member) -> None:
    if member.size > MAX_FILE_BYTES:
        raise DatasetRejected(f"{member.name!r} has {member.size} bytes; a picture has at most {MAX_FILE_BYTES}.")
