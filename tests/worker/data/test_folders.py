"""Folders of pictures: splits and labels from paths, pictures decoded a batch at a time, bad ones refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.contract.errors import DatasetRejected
from tests.worker.loading.files import tarred, zipped
from worker.data import open_data
from worker.data.base import Data

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def picture(pixels: np.ndarray = COLOUR, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def opened(content: bytes, folder: Path) -> Data:
    path = folder / "data.zip"
    path.write_bytes(content)
    return open_data(path, path.name, {}, folder)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_splits_labels_and_pixels(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    files = {
        "train/dog/1.png": picture(),
        "train/cat/2.PNG": picture(COLOUR[::-1].copy()),
        "test/dog/3.bmp": picture(kind="BMP"),
        "calibration/4.png": picture(),
        "README.txt": b"a licence",
    }
    data = opened(pack({f"pets/{name}": content for name, content in files.items()}), tmp_path)
    assert data.facts.labels == ("cat", "dog")
    assert {name: (s.samples, s.has_targets) for name, s in data.facts.splits.items()} == {
        "train": (2, True),
        "test": (1, True),
        "calibration": (1, False),
    }
    assert data.facts.splits["train"].inputs[0].shape == (3, 3, 4)
    batch = data.splits["train"].read([1, 0])
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 1]
    assert np.array_equal(np.asarray(batch.inputs[0]), COLOUR[::-1])  # type: ignore[index]
    assert np.array_equal(np.asarray(batch.inputs[1]), COLOUR)  # type: ignore[index]
    assert data.splits["calibration"].read([0]).targets is None


def test_labels_that_are_numbers_count_as_numbers(tmp_path: Path) -> None:
    files = {f"train/{label}/1.png": picture() for label in (10, 9, 0)}
    assert opened(zipped(files), tmp_path).facts.labels == ("0", "9", "10")


@pytest.mark.parametrize("folder", ["val", "valid", "dev", "eval", "validation"])
def test_validation_has_several_names(tmp_path: Path, folder: str) -> None:
    data = opened(zipped({"train/a/1.png": picture(), f"{folder}/a/2.png": picture()}), tmp_path)
    assert list(data.splits) == ["train", "validation"]


def test_folders_of_labels_alone_are_the_split_train(tmp_path: Path) -> None:
    data = opened(zipped({"dog/1.png": picture(), "cat/2.png": picture()}), tmp_path)
    assert data.facts.labels == ("cat", "dog")
    assert list(data.splits) == ["train"]
    assert data.splits["train"].read([0, 1]).targets.tolist() == [1, 0]  # type: ignore[union-attr]


def test_pictures_alone_have_no_labels(tmp_path: Path) -> None:
    data = opened(zipped({"photos/1.png": picture(), "photos/2.png": picture()}), tmp_path)
    assert data.facts.labels is None
    assert (data.facts.splits["train"].samples, data.facts.splits["train"].targets) == (2, None)


def test_a_table_gives_several_labels_a_picture(tmp_path: Path) -> None:
    rows = b'{"file_name": "1.png", "values": [1, 0, 1]}\n{"file_name": "2.png", "values": [0, 0, 1]}\n'
    data = opened(zipped({"train/1.png": picture(), "train/2.png": picture(), "train/metadata.jsonl": rows}), tmp_path)
    facts = data.facts.splits["train"]
    assert (facts.targets, facts.target_shape, facts.binary) == ("values", (3,), True)
    assert data.splits["train"].read([1, 0]).targets.tolist() == [[0, 0, 1], [1, 0, 1]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "channels", "mode"),
    [
        (picture(GREY), 1, "L"),
        (picture(GREY, mode="1"), 1, "L"),
        (picture(GREY, mode="LA"), 1, "L"),
        (picture(mode="P"), 3, "RGB"),
        (picture(mode="RGBA"), 3, "RGB"),
        (picture(kind="JPEG", mode="CMYK"), 3, "RGB"),
        (picture(kind="WEBP"), 3, "RGB"),
    ],
)
def test_modes_become_grey_or_colour(tmp_path: Path, content: bytes, channels: int, mode: str) -> None:
    data = opened(zipped({"train/a/x.png": content}), tmp_path)
    assert data.facts.splits["train"].inputs[0].shape == (channels, 3, 4)
    assert data.splits["train"].read([0]).inputs[0].mode == mode  # type: ignore[union-attr, index]


def test_different_sizes_leave_the_dimension_open(tmp_path: Path) -> None:
    files = {"train/a/1.png": picture(), "train/a/2.png": picture(COLOUR[:2].copy()), "train/a/3.png": picture(GREY)}
    assert opened(zipped(files), tmp_path).facts.splits["train"].inputs[0].shape == (None, None, 4)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and that has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train/a/x.png": b"\x89PNG\r\n\x1a\nnot really"}, "'train/a/x.png' is no readable picture"),
        ({"train/a/x.png": b""}, "'train/a/x.png' is no readable picture"),
        ({"train/a/x.png": picture(kind="GIF")}, "PNG, JPEG, BMP, WEBP are taken"),
        ({"train/a/x.png": picture(kind="TIFF")}, "PNG, JPEG, BMP, WEBP are taken"),
        ({"train/a/x.tiff": picture(kind="TIFF")}, "'train/a/x.tiff' is no PNG"),
        ({"train/a/x.png": picture(NOISE)[:-2000]}, "'train/a/x.png' is damaged or was cut short"),
        ({"train/a/x.jpg": picture(NOISE, "JPEG")[:-2000]}, "'train/a/x.jpg' is damaged or was cut short"),
        ({"train/a/x.png": png_of(30_000, 30_000)}, "'train/a/x.png' has more than 64000000 pixels"),
        ({"train/a/x.png": png_of(10_000, 10_000)}, "10000 x 10000 pixels"),
        ({"train/a/x.png": picture(GREY.astype(np.uint16) * 200)}, "8 bits a channel"),
        ({"train/a/x.png": picture(), "train/y.png": picture()}, "'train/y.png' lies in no label's folder"),
        ({"train/a/x.png": picture(), "cats/y.png": picture()}, "'cats/y.png'.*<split>/<label>"),
        ({"train/a/b/x.png": picture()}, "'train/a/b/x.png'"),
        ({"a/x.png": picture(), "y.png": picture()}, "'y.png' lies in no label's folder"),
        ({"a/b/x.png": picture(), "a/c/y.png": picture(), "z/z/z.png": picture()}, "'a/b/x.png'"),
        ({"val/a/x.png": picture(), "dev/a/y.png": picture()}, "'val' and 'dev' both mean the split 'validation'"),
        ({"train/a/x.png": picture(), "train/a/y.wav": b"RIFF"}, "pictures .* and sounds .*'train/a/y.wav'"),
        ({"a.txt": b"1", "b.xml": b"2"}, "text or Parquet; its first files are 'a.txt', 'b.xml'"),
    ],
)
def test_pictures_that_are_none_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(zipped(files), tmp_path)


def test_beyond_the_budget_a_cut_picture_is_named_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.data.contents.DECODED_PIXELS", 20)
    data = opened(zipped({"train/a/1.png": picture(), "train/a/2.png": picture(NOISE)[:-2000]}), tmp_path)
    assert data.facts.splits["train"].samples == 2
    with pytest.raises(DatasetRejected, match=r"'train/a/2\.png' is damaged"):
        data.splits["train"].read([1])
