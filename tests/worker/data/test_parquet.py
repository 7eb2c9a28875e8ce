"""Parquet: the same rows as in JSON Lines, with bytes of pictures and sounds; bombs are refused before they unpack."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from app.contract.errors import DatasetRejected
from tests.worker.data.files import PIXELS, WAVE, flac, jsonl, opened, png, table, wav
from tests.worker.loading.files import tarred, zipped

ROWS = [
    {"text": "schön 🙂", "label": 1, "id": 7},
    {"text": "two\nlines", "label": 0, "id": 8},
    {"text": "", "label": 1, "id": 9},
]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_texts_and_labels(tmp_path: Path, compression: str, version: str, dictionary: bool) -> None:
    content = table(
        ROWS, compression=compression, data_page_version=version, use_dictionary=dictionary, row_group_size=2
    )
    data = opened(content, tmp_path, "data.parquet")
    facts = data.facts.splits["train"]
    assert (data.facts.kind, data.facts.labels, facts.samples) == ("text", None, 3)
    assert (facts.target_min, facts.target_max) == (0, 1)
    batch = data.splits["train"].read([2, 0])
    assert (batch.inputs, batch.targets.tolist()) == (["", "schön 🙂"], [1, 1])  # type: ignore[union-attr]


def test_the_same_rows_as_in_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"t{n}", "values": [n / 2, 1.0], "split": ["train", "test"][n % 2]} for n in range(40)
    ]
    one, other = opened(table(rows), tmp_path, "a.parquet"), opened(jsonl(*rows), tmp_path, "a.jsonl")
    assert one.facts == other.facts
    for name in ("train", "test"):
        a, b = (data.splits[name].read(range(20)) for data in (one, other))
        assert a.inputs == b.inputs
        assert a.targets.tolist() == b.targets.tolist()  # type: ignore[union-attr]


def test_words_and_tags(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "ruht"], "tags": ["PER", "O"]}, {"tokens": ["Ja"], "tags": ["O"]}]
    data = opened(table(rows, row_group_size=1), tmp_path)
    batch = data.splits["train"].read([0, 1])
    assert (data.facts.kind, data.facts.labels) == ("tokens", ("O", "PER"))
    assert batch.inputs == [["Ada", "ruht"], ["Ja"]]
    assert [tags.tolist() for tags in batch.targets] == [[1, 0], [0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("nested", [True, False])
def test_pictures(tmp_path: Path, nested: bool) -> None:
    def cell(content: bytes) -> Any:
        return {"bytes": content, "path": "/etc/passwd"} if nested else content

    rows = [{"image": cell(png()), "label": 3}, {"image": cell(png(PIXELS[::-1].copy())), "label": 1}]
    data = opened(table(rows), tmp_path)
    batch = data.splits["train"].read([1, 0])
    assert data.facts.splits["train"].inputs[0].shape == (3, 3, 4)
    assert batch.targets.tolist() == [1, 3]  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(batch.inputs[0]), PIXELS[::-1])  # type: ignore[index]


@pytest.mark.parametrize("field", ["text", "transcription"])
def test_sounds(tmp_path: Path, field: str) -> None:
    rows = [{"audio": {"bytes": make(), "path": None}, field: "eins"} for make in (wav, flac)]
    data = opened(table(rows), tmp_path)
    batch = data.splits["train"].read([0, 1])
    assert (data.facts.kind, batch.targets) == ("audio", ["eins", "eins"])
    assert all(len(sound.samples) == len(WAVE) for sound in batch.inputs)  # type: ignore[union-attr]


@pytest.mark.parametrize("pack", [zipped, tarred, lambda files: tarred(files, "w")])
def test_an_archive_as_the_hub_has_it(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    files = {
        "set/data/train-00000-of-00002.parquet": table(ROWS[:1]),
        "set/data/train-00001-of-00002.parquet": table(ROWS[1:]),
        "set/data/validation-00000-of-00001.parquet": table(ROWS),
        "set/README.md": b"x",
    }
    data = opened(pack(files), tmp_path)
    assert {name: split.samples for name, split in data.facts.splits.items()} == {"train": 3, "validation": 3}
    assert data.splits["train"].read([0, 1, 2]).inputs == [row["text"] for row in ROWS]
    assert not list((tmp_path / "scratch").glob("*.parquet"))


def test_a_file_a_folder(tmp_path: Path) -> None:
    files = {"default/train/0000.parquet": table(ROWS), "default/test/0000.parquet": table(ROWS)}
    assert list(opened(zipped(files), tmp_path).splits) == ["train", "test"]


def noted(rows: list[dict[str, Any]], column: str, feature: object) -> bytes:
    """A file with the note about its features that `datasets` writes."""
    made = pa.Table.from_pylist(rows)
    note = {"huggingface": json.dumps({"info": {"features": {column: feature}}})}
    buffer = io.BytesIO()
    parquet.write_table(made.replace_schema_metadata(note), buffer)
    return buffer.getvalue()


CLASSES = {"names": ["neg", "pos"], "_type": "ClassLabel"}


def test_the_names_of_classes_in_the_hubs_files(tmp_path: Path) -> None:
    data = opened(noted([{"text": "a", "label": 1}], "label", CLASSES), tmp_path)
    assert data.facts.labels == ("neg", "pos")
    assert data.splits["train"].read([0]).targets.tolist() == [1]  # type: ignore[union-attr]
    tagged = noted([{"tokens": ["a"], "tags": [1]}], "tags", {"feature": CLASSES, "_type": "Sequence"})
    data = opened(tagged, tmp_path)
    assert data.facts.labels == ("neg", "pos")
    assert data.splits["train"].read([0]).targets[0].tolist() == [1]  # type: ignore[index]


def test_minus_one_is_the_hubs_word_for_no_label(tmp_path: Path) -> None:
    data = opened(noted([{"text": "a", "label": -1}], "label", CLASSES), tmp_path)
    assert data.facts.splits["train"].targets is None


@pytest.mark.parametrize(
    "feature", [None, 7, [], {"names": "ab"}, {"names": [1]}, {"names": ["a", "a"]}, {"names": []}]
)
def test_a_note_that_is_none_is_passed_over(tmp_path: Path, feature: object) -> None:
    assert opened(noted([{"text": "a", "label": 1}], "label", feature), tmp_path).facts.labels is None


def test_a_label_beyond_the_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetRejected, match="row 1 has the label '2'"):
        opened(noted([{"text": "a", "label": 2}], "label", CLASSES), tmp_path)


TEXT = pa.schema([("text", pa.string())])


def not_utf8() -> bytes:
    buffer = io.BytesIO()
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    parquet.write_table(pa.table({"text": column}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1" + bytes(50), "no whole Parquet file"),
        (b"PAR1PAR1", "no whole Parquet file"),
        (b"PAR1" + bytes(9) + b"\xff\xff\xff\x7fPAR1", "claims a footer of 2147483647 bytes"),
        (table(ROWS)[:-9], "no whole Parquet file"),
        (b"PAR1" + b"x" * 20 + b"\x14\0\0\0PAR1", "'upload' is damaged: its footer cannot be read"),
        (table([{"sentence": "a", "label": 1}]), "has the columns 'sentence, label'.*Expected are the columns"),
        (table([], schema=TEXT), "hold no rows"),
        (table([{"text": 5}]), "Column 'text' of 'upload' holds int64"),
        (table([{"text": "a", "label": 1.5}]), "Column 'label' of 'upload' holds double"),
        (table([{"text": "a", "label": [1]}]), "Column 'label'"),
        (table([{"text": "a", "values": [[1]]}]), "Column 'values'"),
        (table([{"tokens": "a b"}]), "Column 'tokens'"),
        (table([{"tokens": [["a"]]}]), "Column 'tokens'"),
        (table([{"image": "x.png"}]), "Column 'image' of 'upload' holds string"),
        (table([{"image": {"path": "x.png"}}]), "Column 'image'"),
        (
            table([{"image": {"bytes": png(), "path": "a"}}, {"image": {"bytes": None, "path": "/etc/passwd"}}]),
            "row 2 has no bytes in `image`: what a path points to is never opened",
        ),
        (table([{"image": b"GIF89a"}]), "upload, row 1' is no readable picture"),
        (table([{"audio": b"RIFF"}]), "upload, row 1' is no WAV"),
        (table([{"text": "a", "label": 1}, {"text": None, "label": 1}]), "row 2 has no string `text`"),
        (table([{"text": "a", "label": 1}, {"text": "b", "label": None}]), "row 2 lacks a label"),
        (table([{"tokens": ["a", "b"], "tags": [1]}]), "row 1 has 2 tokens and 1 tags"),
        (table([{"tokens": ["a", None], "tags": [1, 1]}]), "row 1 has `tokens` that are no list of words"),
        (table([{"text": "a", "split": "holdout"}]), "row 1 has the split 'holdout'"),
        (table([{"tokens": ["a"] * 70_000}]), "row 1 has a list of 70000 entries"),
        (not_utf8(), "row 1 is not UTF-8"),
    ],
)
def test_faults_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(content, tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data.parquet": table(ROWS)}, "'data.parquet', whose name says no split"),
        ({"train.parquet": table(ROWS), "test.parquet": b"PAR1"}, "'test.parquet' is no whole Parquet"),
        ({"val.parquet": table(ROWS), "dev.parquet": table(ROWS)}, "both mean"),
        (
            {"test.parquet": table(ROWS), "train.parquet": noted(ROWS, "label", CLASSES)},
            "'train.parquet' names other classes",
        ),
    ],
)
def test_archives_that_do_not_fit_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(zipped(files), tmp_path)


def dictionary_bomb() -> bytes:
    """A text of 1 MB that a million rows name: a terabyte of text in a few hundred bytes."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, np.int32)), pa.array(["x" * (1 << 20)]))
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": column}), buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


def page_bomb() -> bytes:
    """A page of 300 MB of zeros."""
    buffer = io.BytesIO()
    schema = pa.schema([("image", pa.binary())])
    parquet.write_table(
        pa.table({"image": [bytes(300 << 20)]}, schema=schema),
        buffer,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    return buffer.getvalue()


def list_bomb(words: int) -> bytes:
    """One row with so many words, all the same."""
    entries = pa.DictionaryArray.from_arrays(pa.array(np.zeros(words, np.int8)), pa.array(["word" * 20]))
    column = pa.ListArray.from_arrays(pa.array([0, words], pa.int32()), entries)
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"tokens": column}), buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "dictionary": (dictionary_bomb, "would unpack to more than"),
    "page": (page_bomb, "unpacks to 31457.* bytes; at most 268435456"),
    "words of a row": (lambda: list_bomb(5_000_000), "row 1 has a list of 5000000 entries"),
    "words of a row group": (lambda: list_bomb(40_000_000), "has a row group with 40000000 values"),
}

OPEN = """
import resource, sys, tempfile
from pathlib import Path
from app.contract.errors import DatasetRejected
from worker.data import open_data
import worker.data.parquet
def peak(): return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) >> 10
before = peak()
with tempfile.TemporaryDirectory() as folder:
    try:
        open_data(Path(sys.argv[1]), "upload", {}, Path(folder))
    except DatasetRejected as refused:
        print(refused.detail)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    make, words = BOMBS[name]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    assert path.stat().st_size < 200_000
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    *said, mebibytes = done.stdout.splitlines()
    assert words.partition(".*")[0] in "".join(said)
    assert int(mebibytes) < 300  # five million entries of one row are the most: Arrow reads a row as a whole


def test_a_file_of_rows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.vetting.archive.FREE_BYTES", 1 << 20)  # with its 64 MiB it takes two million rows
    content = table([{"text": ""}] * 200_000, compression="zstd")
    assert len(content) < 3000
    with pytest.raises(DatasetRejected, match="would unpack to more than 1048576 bytes"):
        opened(content, tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": [""] * 2000},
        {"tokens": ["a"] * 500, "tags": [1] * 500},
        {"text": "a", "values": [0.0] * 2000},
        {"audio": wav(), "text": " " * 8000},
    ],
)
def test_words_and_values_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    monkeypatch.setattr("worker.vetting.archive.FREE_BYTES", 1 << 20)
    content = table([row] * 600, compression="zstd")
    assert len(content) < 5000
    with pytest.raises(DatasetRejected, match="would unpack to more than 1048576 bytes"):
        opened(content, tmp_path)


SWEEP = """
import sys, tempfile
from pathlib import Path
from app.contract.errors import DatasetRejected
from worker.data import open_data
content = Path(sys.argv[1]).read_bytes()
footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
outcomes = {"opened": 0, "refused": 0}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "upload"
    for at in range(footer, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        with tempfile.TemporaryDirectory() as scratch:
            try:
                open_data(path, "upload", {}, Path(scratch))
                outcomes["opened"] += 1
            except DatasetRejected:
                outcomes["refused"] += 1
print(len(content) - footer, outcomes["opened"], outcomes["refused"])
"""


def test_no_damage_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """Of these files, four end the process where Arrow (26.0.1) is asked for its view of their columns."""
    path = tmp_path / "good"
    path.write_bytes(table([{"text": f"row {n}", "label": n % 2} for n in range(30)]))
    done = subprocess.run([sys.executable, "-c", SWEEP, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    length, opened_files, refused = map(int, done.stdout.split())
    assert opened_files + refused == length
    assert refused > length / 3
