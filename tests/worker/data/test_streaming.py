"""Memory: opening a dataset and reading batches from all over it takes a small part of the file's size."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.worker.data.files import wav

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")

FILE_BYTES = 96 << 20
TEXT_BYTES = 32 << 10
SAMPLES = FILE_BYTES // TEXT_BYTES
RANDOM = random.Random(0)


def text(number: int) -> str:
    """32 kB that compress badly."""
    return RANDOM.randbytes(TEXT_BYTES // 2).hex()


def sound(number: int) -> bytes:
    samples = np.frombuffer(RANDOM.randbytes(TEXT_BYTES), np.int16)
    return wav(samples)


def json_lines(path: Path) -> None:
    with path.open("w") as stream:
        for number in range(SAMPLES):
            stream.write(json.dumps({"text": text(number), "label": number % 3}) + "\n")


def plain(path: Path) -> None:
    with path.open("w") as stream:
        for number in range(SAMPLES):
            stream.write(text(number) + "\n")


def in_parquet(path: Path) -> None:
    """One row group as large as the file, in pages of a megabyte."""
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    rows = {"text": [text(number) for number in range(SAMPLES)], "label": [number % 3 for number in range(SAMPLES)]}
    parquet.write_table(pa.table(rows, schema=schema), path, row_group_size=SAMPLES, write_batch_size=16)


def shards(path: Path) -> None:
    with tarfile.open(path, "w") as outer:
        for shard in range(4):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number in range(SAMPLES // 4):
                    for name, content in ((f"{number:06}.wav", sound(number)), (f"{number:06}.cls", b"1")):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        inner.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo(f"train-{shard:06}.tar")
            info.size = buffer.tell()
            buffer.seek(0)
            outer.addfile(info, buffer)


def sounds(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(SAMPLES):
            archive.writestr(f"train/{number % 2}/{number}.wav", sound(number))


def arrays(path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((SAMPLES, TEXT_BYTES // 4)).astype(np.float32)
    with path.open("wb") as stream:
        np.savez(stream, train_inputs=inputs, train_targets=np.arange(SAMPLES) % 5)


MEASURE = """
import random, sys, tempfile
from pathlib import Path
from worker.data import open_data
import worker.data.parquet, soundfile
def kilobytes(field):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field)))
path, name, field = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes(field)
with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
    data = open_data(Path(path), name, {}, Path(folder))
    order = random.Random(0)
    split = data.splits["train"]
    for _ in range(60):
        split.read([order.randrange(len(split)) for _ in range(16)])
    print(sum(map(len, data.splits.values())), kilobytes(field) - before)
"""

FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "data.jsonl": (json_lines, "VmHWM"),
    "data.txt": (plain, "VmHWM"),
    "data.parquet": (in_parquet, "VmHWM"),
    "shards.tar": (shards, "VmHWM"),
    "sounds.zip": (sounds, "VmHWM"),
    "data.npz": (
        arrays,
        "RssAnon",
    ),  # the arrays are mapped: their pages count as resident and are the kernel's to take
}


@pytest.mark.parametrize("name", FORMATS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    make, field = FORMATS[name]
    path = tmp_path / name
    make(path)
    assert path.stat().st_size > 0.9 * FILE_BYTES
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), name, field], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples, kilobytes = map(int, done.stdout.split())
    assert samples >= SAMPLES
    assert kilobytes < FILE_BYTES / 1024 / 3, f"{name}: {kilobytes} kB"
