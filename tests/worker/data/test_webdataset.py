"""WebDataset: files of one key are one sample, in a tar, a zip or shards; hostile shards are refused by name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.contract.errors import DatasetRejected
from tests.worker.data.files import PIXELS, WAVE, flac, opened, png, wav
from tests.worker.data.test_folders import png_of
from tests.worker.loading.files import tarred, zipped


def shard(files: dict[str, bytes]) -> bytes:
    return tarred(files, "w")


PICTURES = {
    "0001.png": png(),
    "0001.cls": b"2\n",
    "0002.cls": b"0",
    "0002.PNG": png(PIXELS[::-1].copy()),
    "0002.txt": b"a caption",
    "0002.pyd": b"never read",
}


@pytest.mark.parametrize("pack", [zipped, tarred, shard])
def test_pictures_with_classes(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    data = opened(pack(PICTURES), tmp_path, "train-000000.tar")
    assert (data.facts.kind, data.facts.labels) == ("images", None)
    facts = data.facts.splits["train"]
    assert (facts.samples, facts.target_min, facts.target_max) == (2, 0, 2)
    batch = data.splits["train"].read([1, 0])
    assert batch.targets.tolist() == [0, 2]  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(batch.inputs[0]), PIXELS[::-1])  # type: ignore[index]
    assert np.array_equal(np.asarray(batch.inputs[1]), PIXELS)  # type: ignore[index]


def test_class_names(tmp_path: Path) -> None:
    data = opened(shard({"a.png": png(), "a.cls": b"dog", "b.png": png(), "b.cls": b"cat"}), tmp_path)
    assert data.facts.labels == ("cat", "dog")
    assert data.splits["train"].read([0, 1]).targets.tolist() == [1, 0]  # type: ignore[union-attr]


def test_documents_beside_pictures(tmp_path: Path) -> None:
    files = {"a.png": png(), "a.json": b'{"label": 4, "url": "http://x"}', "b.png": png(), "b.json": b'{"label": 1}'}
    assert opened(shard(files), tmp_path).splits["train"].read([0, 1]).targets.tolist() == [4, 1]  # type: ignore[union-attr]
    several = {"a.png": png(), "a.json": b'{"values": [1, 0]}'}
    assert opened(shard(several), tmp_path).facts.splits["train"].binary


def test_captions_are_no_labels(tmp_path: Path) -> None:
    data = opened(shard({"a.png": png(), "a.txt": b"a caption", "a.json": b'{"caption": "x"}'}), tmp_path)
    assert data.facts.splits["train"].targets is None


def test_a_folder_of_labels_with_texts_beside_the_pictures_stays_one(tmp_path: Path) -> None:
    files = {"train/dog/1.png": png(), "train/dog/1.txt": b"boxes", "train/cat/2.png": png(), "train/cat/2.json": b"{}"}
    assert opened(zipped(files), tmp_path).facts.labels == ("cat", "dog")


def test_sounds(tmp_path: Path) -> None:
    spoken = {"a.wav": wav(), "a.txt": "schön".encode(), "a.json": b'{"text": "other"}', "b.flac": flac()}
    data = opened(shard(spoken | {"b.json": b'{"transcription": "gut"}'}), tmp_path)
    batch = data.splits["train"].read([0, 1])
    assert (data.facts.kind, batch.targets) == ("audio", ["schön", "gut"])
    assert len(batch.inputs[0].samples) == len(WAVE)  # type: ignore[index, union-attr]
    labelled = opened(shard({"a.wav": wav(), "a.cls": b"yes"}), tmp_path)
    assert (labelled.facts.labels, labelled.facts.splits["train"].targets) == (("yes",), "classes")


def test_texts(tmp_path: Path) -> None:
    data = opened(shard({"a.txt": b"good", "a.cls": b"1", "b.txt": b"bad", "b.cls": b"0"}), tmp_path)
    batch = data.splits["train"].read([0, 1])
    assert (batch.inputs, batch.targets.tolist()) == (["good", "bad"], [1, 0])  # type: ignore[union-attr]


def test_splits_are_top_folders(tmp_path: Path) -> None:
    files = {"train/deep/a.png": png(), "train/deep/a.cls": b"0", "val/a.png": png(), "val/a.cls": b"1"}
    assert list(opened(shard(files), tmp_path).splits) == ["train", "validation"]


@pytest.mark.parametrize("outer", [zipped, tarred, shard])
def test_shards(tmp_path: Path, outer: Callable[[dict[str, bytes]], bytes]) -> None:
    shards = {
        "set/train-000001.tar": shard({"0000.png": png(PIXELS[::-1].copy()), "0000.cls": b"1"}),
        "set/train-000000.tar": shard({"0000.png": png(), "0000.cls": b"0"}),
        "set/test-000000.tar": shard({"0000.png": png(), "0000.cls": b"7"}),
        "set/README.md": b"x",
    }
    data = opened(outer(shards), tmp_path)
    assert {name: split.samples for name, split in data.facts.splits.items()} == {"train": 2, "test": 1}
    batch = data.splits["train"].read([0, 1])
    assert batch.targets.tolist() == [0, 1]  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(batch.inputs[1]), PIXELS[::-1])  # type: ignore[index]


def test_shards_of_rows(tmp_path: Path) -> None:
    rows = {"a.json": b'{"tokens": ["x", "y"], "tags": ["A", "B"]}', "b.json": b'{"tokens": ["z"], "tags": ["A"]}'}
    data = opened(zipped({"train-0.tar": shard(rows), "dev-0.tar": shard(rows)}), tmp_path)
    assert (data.facts.kind, data.facts.labels, list(data.splits)) == ("tokens", ("A", "B"), ["train", "validation"])


def test_shards_without_a_splits_name_are_train(tmp_path: Path) -> None:
    shards = {f"{number:06}.tar": shard({"a.png": png(), "a.cls": b"0"}) for number in range(3)}
    assert {name: s.samples for name, s in opened(zipped(shards), tmp_path).facts.splits.items()} == {"train": 3}


def linked(kind: bytes) -> bytes:
    """A tar with a sample and a link or a device."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {"a.png": png(), "a.cls": b"0"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return buffer.getvalue()


def twice() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("a.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"0"))
    return buffer.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a bomb of pixels": (shard({"a.png": png_of(30_000, 30_000), "a.cls": b"0"}), "more than 64000000 pixels"),
    "a path out of it": (shard({"../a.png": png(), "a.cls": b"0"}), r"'\.\.'"),
    "an absolute path": (shard({"/a.png": png(), "a.cls": b"0"}), "relative"),
    "a symbolic link": (linked(tarfile.SYMTYPE), "'b.png', a link"),
    "a hard link": (linked(tarfile.LNKTYPE), "'b.png', a link"),
    "a device": (linked(tarfile.CHRTYPE), "'b.png', a link or a device"),
    "a name twice": (twice(), "'a.cls' twice"),
    "two files of one field": (shard({"a.png": png(), "a.PNG": png(), "a.cls": b"0"}), "'[^']*a' has two files 'png'"),
    "two pictures of one key": (shard({"a.png": png(), "a.jpg": png(), "a.cls": b"0"}), "png and jpg"),
    "a picture and a sound": (shard({"a.png": png(), "a.wav": wav(), "a.cls": b"0"}), "one picture or one sound"),
    "mixed kinds": (
        shard({"a.png": png(), "a.cls": b"0", "b.txt": b"x", "b.cls": b"0"}),
        "the key '[^']*b' is text, and what came before is images",
    ),
    "a label and no content": (
        shard({"a.png": png(), "a.cls": b"0", "b.cls": b"1"}),
        "'[^']*b' has a label and no con",
    ),
    "an empty label": (shard({"a.png": png(), "a.cls": b" "}), "a.cls' is empty"),
    "a label of bytes": (shard({"a.png": png(), "a.cls": b"\xff"}), "a.cls' is not UTF-8"),
    "a huge label": (shard({"a.png": png(), "a.cls": b"9" * 11}), "the label 99999999999"),
    "a label of two megabytes": (shard({"a.png": png(), "a.cls": b"x" * (2 << 20)}), "at most 1048576"),
    "a half-labelled set": (shard({"a.png": png(), "a.cls": b"0", "b.png": png()}), "lacks a label"),
    "a document that is none": (shard({"a.png": png(), "a.json": b"{", "a.cls": b"0"}), "a.json' is no JSON"),
    "a document of another kind": (
        shard({"a.png": png(), "a.json": b"[]", "a.cls": b"0"}),
        "a.json' is no JSON object",
    ),
    "two targets": (shard({"a.wav": wav(), "a.cls": b"0", "a.txt": b"x"}), "`label` and `transcription`"),
    "a damaged picture": (shard({"a.png": png()[:40], "a.cls": b"0"}), "a.png' is "),
    "a sound that lies": (shard({"a.wav": b"RIFF", "a.cls": b"0"}), "a.wav' is no WAV"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("packed", ["alone", "in a zip", "in a tar"])
def test_hostile_shards_are_refused(tmp_path: Path, name: str, packed: str) -> None:
    content, words = HOSTILE[name]
    if packed != "alone":
        content = (zipped if packed == "in a zip" else shard)({"train-000000.tar": content})
    with pytest.raises(DatasetRejected, match=words):
        opened(content, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "uploaded"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train-0.tar": shard({"README": b"x"})}, "shards hold no samples"),
        ({"train-0.tar": b""}, "damaged or was cut short"),
        ({"train-0.tar": shard(PICTURES)[:700]}, "damaged or was cut short|ends in the middle"),
        ({"train-0.tar": b"not a tar" * 100}, "damaged or was cut short"),
        ({"train-0.tar.gz": tarred(PICTURES)}, "'train-0.tar.gz' is compressed"),
        ({"train-0.tar": tarred(PICTURES)}, "damaged or was cut short"),
        ({"train-0.tar": shard(PICTURES), "more.tar": shard(PICTURES)}, "'more.tar' names no split"),
        ({"val-0.tar": shard(PICTURES), "dev-0.tar": shard(PICTURES)}, "both mean the split 'validation'"),
    ],
)
def test_shards_that_are_none_are_refused(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(zipped(files), tmp_path)
