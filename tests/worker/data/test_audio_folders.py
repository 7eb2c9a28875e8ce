"""Folders of sounds: targets out of a table or the path, real recordings, and tables that do not fit their files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.contract.errors import DatasetRejected
from tests.worker.data.files import WAVE, flac, jsonl, opened, png, wav
from tests.worker.loading.files import tarred, zipped
from worker.data.base import Sound

SAMPLES = (WAVE / np.float32(32768)).tolist()


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_transcripts_of_a_table(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    files = {
        "metadata.jsonl": jsonl(
            {"file_name": "train/a.wav", "transcription": "eins"},
            {"file_name": "./train/deep/b.flac", "transcription": "zwei \u00fc"},
            {"file_name": "test/c.wav", "text": "drei"},
        ),
        "train/a.wav": wav(),
        "train/deep/b.flac": flac(),
        "test/c.wav": wav(WAVE[:3], 16_000),
        "README.md": b"read me",
    }
    data = opened(pack({f"corpus/{name}": content for name, content in files.items()}), tmp_path)
    assert (data.facts.kind, data.facts.labels) == ("audio", None)
    assert {name: (s.samples, s.targets) for name, s in data.facts.splits.items()} == {
        "train": (2, "transcripts"),
        "test": (1, "transcripts"),
    }
    assert data.facts.splits["train"].inputs[0].shape == (7,)
    batch = data.splits["train"].read([1, 0])
    assert batch.targets == ["zwei \u00fc", "eins"]
    sound = batch.inputs[0]  # type: ignore[index]
    assert isinstance(sound, Sound)
    assert (sound.rate, sound.samples.tolist()) == (8000, SAMPLES)
    assert data.splits["test"].read([0]).inputs[0].rate == 16_000  # type: ignore[index, union-attr]


def test_labels_of_a_table_a_folder(tmp_path: Path) -> None:
    files = {
        "train/metadata.csv": b'file_name,label\na.wav,dog\n"b.wav",cat\n',
        "train/a.wav": wav(),
        "train/b.wav": wav(WAVE[:2]),
        "dev/metadata.csv": b"file_name,label\na.wav,cat\n",
        "dev/a.wav": wav(),
    }
    data = opened(zipped(files), tmp_path)
    assert data.facts.labels == ("cat", "dog")
    assert list(data.splits) == ["train", "validation"]
    assert data.facts.splits["train"].inputs[0].shape == (None,)
    assert data.splits["train"].read([0, 1]).targets.tolist() == [1, 0]  # type: ignore[union-attr]


def test_a_split_in_the_table(tmp_path: Path) -> None:
    rows = jsonl(
        {"file_name": "a.wav", "label": 3, "split": "train"},
        {"file_name": "b.wav", "label": 1, "split": "valid"},
    )
    data = opened(zipped({"metadata.jsonl": rows, "a.wav": wav(), "b.wav": wav()}), tmp_path)
    assert list(data.splits) == ["train", "validation"]
    assert data.facts.labels is None
    assert data.splits["train"].read([0]).targets.tolist() == [3]  # type: ignore[union-attr]


def test_labels_of_the_path(tmp_path: Path) -> None:
    data = opened(zipped({"train/yes/1.wav": wav(), "train/no/2.WAV": wav(), "calibration/3.wav": wav()}), tmp_path)
    assert data.facts.labels == ("no", "yes")
    assert data.splits["train"].read([0, 1]).targets.tolist() == [1, 0]  # type: ignore[union-attr]
    assert data.facts.splits["calibration"].targets is None


def test_sounds_alone_have_no_targets(tmp_path: Path) -> None:
    data = opened(tarred({f"recordings/{n}.wav": wav() for n in range(3)}), tmp_path)
    assert {name: (s.samples, s.targets) for name, s in data.facts.splits.items()} == {"train": (3, None)}


ROW = {"file_name": "a.wav", "label": "x"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"metadata.jsonl": b"{", "a.wav": wav()}, "'metadata.jsonl', line 1 is no JSON"),
        ({"metadata.jsonl": jsonl(ROW) + b"[1]", "a.wav": wav()}, "line 2 is no JSON object"),
        ({"metadata.jsonl": jsonl({"label": "x"}), "a.wav": wav()}, "line 1 has no string `file_name`"),
        ({"metadata.jsonl": jsonl({"file_name": 7}), "a.wav": wav()}, "line 1 has no string `file_name`"),
        ({"metadata.jsonl": jsonl(ROW | {"file_name": "../a.wav"}), "a.wav": wav()}, "no such file"),
        ({"metadata.jsonl": jsonl(ROW | {"file_name": "/etc/passwd"}), "a.wav": wav()}, "no such file"),
        ({"metadata.jsonl": jsonl(ROW | {"file_name": "b.wav"}), "a.wav": wav()}, "line 1 describes 'b.wav'"),
        ({"metadata.jsonl": jsonl(ROW, ROW), "a.wav": wav()}, "line 2 describes 'a.wav', which a row before it does"),
        ({"metadata.jsonl": jsonl(ROW), "a.wav": wav(), "b.wav": wav()}, "'b.wav' has no row in metadata.jsonl"),
        ({"metadata.jsonl": jsonl(ROW | {"text": "x"}), "a.wav": wav()}, "`label` and `text`"),
        ({"metadata.jsonl": jsonl({"file_name": "a.wav", "text": 7}), "a.wav": wav()}, "a transcript is a string"),
        ({"metadata.jsonl": jsonl(ROW | {"split": "holdout"}), "a.wav": wav()}, "the split 'holdout'"),
        ({"metadata.jsonl": jsonl(ROW | {"label": [1]}), "a.wav": wav()}, "the label"),
        ({"metadata.csv": b"", "a.wav": wav()}, "line 1 is no header with a column `file_name`"),
        ({"metadata.csv": b"name,label\na.wav,x\n", "a.wav": wav()}, "no header with a column `file_name`"),
        ({"metadata.csv": b"file_name,label\na.wav\n", "a.wav": wav()}, "line 2 has 1 cells"),
        ({"metadata.csv": b"file_name,label\na.wav,f\xfcr\n", "a.wav": wav()}, "line 2 is not UTF-8"),
        ({"metadata.csv": b"file_name,label\n", "a.wav": wav()}, "'a.wav' has no row"),
        (
            {"train/metadata.jsonl": jsonl(ROW | {"split": "test"}), "train/a.wav": wav()},
            "the split 'test', and 'train/a.wav' lies in the folder of 'train'",
        ),
        (
            {
                "metadata.jsonl": jsonl(ROW | {"file_name": "train/a.wav"}, ROW | {"file_name": "other/b.wav"}),
                "train/a.wav": wav(),
                "other/b.wav": wav(),
            },
            "'other/b.wav' lies in no split's folder",
        ),
        (
            {
                "metadata.jsonl": jsonl(ROW, {"file_name": "b.wav"}),
                "a.wav": wav(),
                "b.wav": wav(),
            },
            "line 2 lacks a label",
        ),
        ({"train/a/x.wav": b"RIFF not really"}, "'train/a/x.wav' is no WAV"),
        ({"train/a/x.mp3": b"ID3"}, "'train/a/x.mp3' is no WAV or FLAC sound"),
        ({"train/a/x.flac": png()}, "'train/a/x.flac' is no WAV or FLAC"),
        ({"train/a/x.wav": wav(), "train/b/y.png": png()}, "pictures .* and sounds"),
    ],
)
def test_tables_and_files_that_do_not_fit_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(zipped(files), tmp_path)


def test_beyond_the_budget_a_cut_sound_is_named_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.data.contents.DECODED_FRAMES", 60)
    data = opened(zipped({"train/a/1.wav": wav(), "train/a/2.flac": flac()[:-8]}), tmp_path)
    assert data.facts.splits["train"].samples == 2
    with pytest.raises(DatasetRejected, match=r"'train/a/2\.flac' is damaged"):
        data.splits["train"].read([1])


def recordings() -> Path:
    """The free spoken digits of Z. Jackson and others, where they are."""
    folders = [os.environ.get("TERSOR_TEST_DATA", ""), Path(__file__).parents[4] / "shared" / "data"]
    found = [Path(folder) / "free-spoken-digits.tar" for folder in folders if folder]
    existing = next((path for path in found if path.exists()), None)
    if existing is None:
        pytest.skip("free-spoken-digits.tar is in neither TERSOR_TEST_DATA nor ../shared/data")
    return existing


def test_real_recordings(tmp_path: Path) -> None:
    with tarfile.open(recordings()) as archive:
        names = [f"recordings/{digit}_jackson_{index}.wav" for digit in range(10) for index in range(12)]
        contents = [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    files = {f"{name[11]}/{name[11:]}": content for name, content in zip(names, contents, strict=True)}
    data = opened(tarred(files, "w"), tmp_path)
    assert data.facts.labels == tuple("0123456789")
    assert {name: s.samples for name, s in data.facts.splits.items()} == {"train": 96, "validation": 12, "test": 12}
    batch = data.splits["train"].read(range(96))
    seconds = [len(sound.samples) / sound.rate for sound in batch.inputs]  # type: ignore[union-attr]
    assert all(0.1 < length < 3 for length in seconds)
    assert {sound.rate for sound in batch.inputs} == {8000}  # type: ignore[union-attr]
    peaks = [float(sound.samples.abs().max()) for sound in batch.inputs]  # type: ignore[union-attr]
    assert 0.02 < min(peaks) <= max(peaks) <= 1.0
