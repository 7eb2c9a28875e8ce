"""Good files with bytes flipped, cut or doubled: they load, or they are refused; nothing else ever comes out."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save
from torch import nn

from app.contract.errors import DatasetRejected, ModelRejected
from tests.worker.data.files import flac, jsonl, png, table, wav
from tests.worker.loading.files import bert, folder_files, linear_file, linear_spec, tarred, torch_saved, zipped
from tests.worker.loading.onnx_files import const, noise, one_node
from worker.inspect import inspect_upload

EXAMPLES = 150  # a kind; the seed is fixed, so that a failure is one for everybody
FEWER_EXAMPLES = 15  # where one example takes long


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train_inputs=np.eye(4, dtype=np.float32), train_targets=np.arange(4))
    return buffer.getvalue()


def array_file(targets: np.ndarray) -> bytes:
    return save({"train_inputs": np.eye(4, dtype=np.float32), "train_targets": targets})


def pictures(pack: Callable[[dict[str, bytes]], bytes], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
    return pack({f"train/{label}/1.{kind}": buffer.getvalue() for label in "ab"})


def plain_tar(files: dict[str, bytes]) -> bytes:
    return tarred(files, "w")


def shards() -> bytes:
    sample = {"0.png": png(), "0.cls": b"1", "1.png": png(), "1.json": b'{"label": 0}'}
    return plain_tar({"train-0.tar": plain_tar(sample), "test-0.tar": plain_tar(sample)})


def recordings(table: str) -> bytes:
    tables = {
        "metadata.jsonl": jsonl({"file_name": "a.wav", "text": "eins"}, {"file_name": "b.flac", "text": "zwei"}),
        "metadata.csv": b"file_name,label\na.wav,ja\nb.flac,nein\n",
    }
    return plain_tar({"a.wav": wav(), "b.flac": flac(), table: tables[table]})


def parquet_of(kind: str) -> bytes:
    if kind == "text":
        return table([{"text": f"row {n}", "label": n % 2} for n in range(30)], row_group_size=20)
    if kind == "tokens":
        rows = [{"tokens": ["a", str(n)], "tags": ["A", "B"]} for n in range(30)]
        return table(rows, row_group_size=20, data_page_version="2.0", compression="zstd")
    return table([{"image": {"bytes": png(), "path": "x"}, "label": n} for n in range(3)], compression="none")


def safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return linear_file(Path(folder) / "m").read_bytes()


def huggingface() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        bert(Path(folder))
        return zipped(folder_files(Path(folder)))


JSON_LINES = '{"text": "gut", "label": 0}\n{"text": "schön", "label": 1}\n'.encode()
CSV = 'text,label\n"a, b",1\nschön,0\n'.encode()
STATE = nn.Sequential(nn.Linear(4, 2)).state_dict()

MODELS: dict[str, Callable[[], bytes]] = {
    "safetensors": safetensors,
    "torch.save": lambda: torch_saved(STATE),
    "old torch.save": lambda: torch_saved(STATE, _use_new_zipfile_serialization=False),
    "huggingface": huggingface,
    "onnx": lambda: one_node("Gemm", 20, [noise(2, 4), const(noise(4, 3)), const(noise(3))]).SerializeToString(),
}
SPECS: dict[str, dict[str, Any]] = {"huggingface": {}, "onnx": {"task": "image-classification"}}
DATASETS: dict[str, Callable[[], bytes]] = {
    "npz": npz,
    "png in zip": lambda: pictures(zipped, "png"),
    "jpeg in tar.gz": lambda: pictures(tarred, "jpeg"),
    "webp in tar": lambda: pictures(lambda files: tarred(files, "w"), "webp"),
    "bmp in zip": lambda: pictures(zipped, "bmp"),
    "jsonl": lambda: JSON_LINES,
    "csv": lambda: CSV,
    "text in zip": lambda: zipped({"train.jsonl": JSON_LINES, "test.csv": CSV}),
    "words": lambda: jsonl({"tokens": ["a", "b"], "tags": ["A", "B"]}, {"tokens": ["c"], "tags": ["A"]}),
    "plain text": lambda: zipped({"train.txt": "Ein Satz.\n\nZwei Sätze.\n".encode(), "val.txt": b"a\nb\n"}),
    "values": lambda: array_file(np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2)),
    "tags": lambda: array_file(np.arange(16).reshape(4, 4)),
    "webdataset": lambda: plain_tar({"0.png": png(), "0.cls": b"1", "1.png": png(), "1.cls": b"0"}),
    "shards": shards,
    "sounds and transcripts": lambda: recordings("metadata.jsonl"),
    "sounds and labels": lambda: recordings("metadata.csv"),
    "parquet of text": lambda: parquet_of("text"),
    "parquet of words": lambda: parquet_of("tokens"),
    "parquet of pictures": lambda: parquet_of("image"),
}

EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "double", "zero", "end"]), st.floats(0, 1), st.integers(1, 255)),
    min_size=1,
    max_size=4,
)


def spoiled(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    data = bytearray(content)
    for edit, share, value in edits:
        at = int(share * max(0, len(data) - 1))
        match edit:
            case "flip" if data:
                data[at] ^= value
            case "cut":
                del data[at : at + value]
            case "double":
                data[at:at] = data[at : at + value]
            case "zero":
                data[at : at + value] = bytes(len(data[at : at + value]))
            case "end":
                del data[at:]
    return bytes(data)


def inspect(kind: str, content: bytes, spec: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        path = scratch / "upload"
        path.write_bytes(content)
        refusal = ModelRejected if kind == "model" else DatasetRejected
        detail = None
        try:
            inspect_upload(kind, path, "upload", spec, scratch)
        except refusal as refused:
            detail = refused.detail
        assert detail is None or (len(detail) > 20 and folder not in detail)


def fuzz(kind: str, content: bytes, spec: dict[str, Any], examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(EDITS)
    def run(edits: list[tuple[str, float, int]]) -> None:
        inspect(kind, spoiled(content, edits), spec)

    run()


@pytest.mark.parametrize("name", MODELS)
def test_a_spoiled_model_loads_or_is_refused(name: str) -> None:
    folder = name == "huggingface"
    fuzz("model", MODELS[name](), SPECS.get(name, linear_spec()), FEWER_EXAMPLES if folder else EXAMPLES)


@pytest.mark.parametrize("name", DATASETS)
def test_a_spoiled_dataset_opens_or_is_refused(name: str) -> None:
    fuzz("dataset", DATASETS[name](), {}, EXAMPLES)


@pytest.mark.parametrize("kind", ["model", "dataset"])
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_refused_or_read(kind: str, content: bytes) -> None:
    inspect(kind, content, linear_spec() if kind == "model" else {})
