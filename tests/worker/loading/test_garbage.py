"""What is no model: refused with a sentence that says what came; nothing runs, nothing is left outside scratch."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.errors import ModelRejected
from tests.worker.loading.files import Bomb, linear_file, linear_spec, torch_saved, zipped
from worker.inspect import inspect_upload

Make = Callable[[Path], bytes]


def good(path: Path) -> bytes:
    return linear_file(path / "good.safetensors").read_bytes()


def with_header(change: Callable[[dict[str, Any]], Any]) -> Make:
    """The good file with another header; the data stays."""

    def make(path: Path) -> bytes:
        body = good(path)
        (length,) = struct.unpack("<Q", body[:8])
        header = change(json.loads(body[8 : 8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body[8 + length :]

    return make


def with_entry(**fields: Any) -> Make:
    return with_header(lambda header: header | {"0.bias": header["0.bias"] | fields})


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2))


def scripted(_: Path) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module(), torch.ones(1, 4)), buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def exported(_: Path) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module(), (torch.ones(1, 4),)), buffer)
    return buffer.getvalue()


def bare_pickle(path: Path) -> bytes:
    return pickle.dumps(Bomb(path / "executed"))


def pickle_in_torch_zip(path: Path) -> bytes:
    return torch_saved({"0.weight": Bomb(path / "executed")})


def pickle_in_legacy(path: Path) -> bytes:
    return torch_saved({"0.weight": Bomb(path / "executed")}, _use_new_zipfile_serialization=False)


def compressed_torch_zip(_: Path) -> bytes:
    return zipped({"archive/data.pkl": b"\0" * 10_000, "archive/version": b"3"})


ENTRY = b'"0.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DUPLICATE = b"{" + ENTRY + b"," + ENTRY + b"}"

KINDS: dict[str, tuple[Make, str]] = {
    "nothing": (lambda _: b"", "empty"),
    "one byte": (lambda _: b"x", "no file of a known kind"),
    "random": (lambda _: bytes(range(200, 256)) * 50, r"not that of a \.safetensors file"),
    "cut short": (lambda path: good(path)[:-5], "safetensors .* cut short"),
    "appended": (lambda path: good(path) + b"tail", "appended"),
    "header of 2^60 bytes": (lambda _: struct.pack("<Q", 1 << 60) + b"{}", "header claims"),
    "header of 90 MB": (lambda _: struct.pack("<Q", 90 << 20) + b"{" + b" " * (90 << 20), "at most 8388608"),
    "header no JSON": (with_header(lambda _: b"{oops"), "no JSON"),
    "header too deep": (with_header(lambda _: b'{"a":' + b"[" * 100_000), "no JSON"),
    "duplicate name": (with_header(lambda _: DUPLICATE), "'0.bias' twice"),
    "many tensors": (
        with_header(lambda _: {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}),
        "100001 tensors",
    ),
    "overlap": (with_entry(data_offsets=[4, 12]), "overlap|gap"),
    "outside": (with_entry(data_offsets=[32, 40 << 30]), "takes 8 bytes"),
    "negative": (with_entry(data_offsets=[-8, 0]), "takes 8 bytes|offsets|overlap"),
    "shape x dtype": (with_entry(shape=[3]), "takes 12 bytes"),
    "huge shape": (with_entry(shape=[1 << 60]), "impossible shape"),
    "odd shape": (with_entry(shape=["2"]), "impossible shape"),
    "odd dtype": (with_entry(dtype="PICKLE"), "dtype PICKLE"),
    "odd metadata": (with_header(lambda header: header | {"__metadata__": {"a": 1}}), "metadata"),
    "unprintable name": (with_header(lambda header: header | {"a\0b": header["0.bias"]}), "unusable name"),
    "whole module": (lambda _: torch_saved(module()), r"save_file\(model\.state_dict\(\)"),
    "bare pickle": (bare_pickle, "(?s)pickle.*torch.export.save.*torch.onnx.export.*save_file"),
    "pickle in a state dict": (pickle_in_torch_zip, "pickled objects"),
    "pickle in an old state dict": (pickle_in_legacy, "pickled objects"),
    "compressed torch.save": (compressed_torch_zip, "compressed"),
    "list of tensors": (lambda _: torch_saved([torch.ones(2)]), "holds list"),
    "numbers": (lambda _: torch_saved({"0.weight": 1.0}), "'0.weight' is float"),
    "sparse": (lambda _: torch_saved({"0.weight": torch.eye(2).to_sparse()}), "'0.weight' is float32 sparse_coo"),
    "cut torch.save": (lambda _: torch_saved(module().state_dict())[:-200], "cut short"),
    "cut old torch.save": (
        lambda _: torch_saved(module().state_dict(), _use_new_zipfile_serialization=False)[:-60],
        "damaged or cut short",
    ),
    "TorchScript": (scripted, "TorchScript"),
    "torch.export": (exported, "brings its own layers"),
    "Keras": (lambda _: zipped({"config.json": b"{}", "model.weights.h5": b"", "metadata.json": b"{}"}), "Keras"),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "ONNX": (lambda _: b"\x08\x0a\x12\x07pytorch" + bytes(100), "ONNX"),
    "GGUF": (lambda _: b"GGUF\3\0\0\0{" + bytes(100), "GGUF"),
    "TensorFlow": (lambda _: zipped({"m/saved_model.pb": b"x", "m/variables/v": b"x"}), "SavedModel"),
    "TensorFlow Lite": (lambda _: b"\x1c\0\0\0TFL3" + bytes(100), "TensorFlow Lite"),
    "web page": (lambda _: b"<!DOCTYPE html><html>" * 9, "web page"),
    "git-lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "gzip": (lambda _: b"\x1f\x8b" + bytes(50), "gzip"),
    "7z": (lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(50), "zip, tar or tar.gz"),
    "picture": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
    "arrays": (lambda _: zipped({"a.npy": b"x"}), "NumPy"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what clients still have is made here
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_is_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    make, words = KINDS[kind]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(make(tmp_path / "in"))
    (tmp_path / "in" / "good.safetensors").unlink(missing_ok=True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ModelRejected, match=words) as caught:
        inspect_upload("model", path, "model.safetensors", linear_spec(), scratch)
    assert len(caught.value.detail) > 30
    assert str(tmp_path) not in caught.value.detail
    assert [file.name for file in (tmp_path / "in").iterdir()] == ["model.safetensors"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["in", "scratch"]


def test_weights_without_an_architecture_are_refused(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "m.safetensors")
    with pytest.raises(ModelRejected, match=r"give spec\.architecture") as caught:
        inspect_upload("model", path, path.name, {}, tmp_path)
    assert caught.value.pointer == "/architecture"
