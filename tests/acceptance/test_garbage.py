"""Garbage of every kind: a 4xx problem or the status `rejected` with a sentence, never a 5xx, nothing left on disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.acceptance.conftest import Service
from tests.hostile.models import many_tensors, twice_named
from tests.worker.data import test_parquet as parquet
from tests.worker.data.files import raw_wav
from tests.worker.data.test_arrays import header
from tests.worker.data.test_folders import png_of
from tests.worker.loading.files import tarred
from tests.worker.loading.files import zipped as packed_zip
from tests.worker.vetting import test_onnx as onnx_files
from tests.worker.vetting import test_pt2 as programs
from tests.worker.vetting.test_archive import tar_member
from worker.demo.train_lenet import SPEC, lenet

INSPECTION_SECONDS = 60.0
IMAGES = {"task": "image-classification"}
# Made by whatever executes one of the pickles below.
PROOF = Path(tempfile.mkdtemp(prefix="tersor-proof-")) / "executed"


class Bomb:
    """A pickle that would make a file if anybody loaded it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def weights() -> bytes:
    return save(lenet().state_dict())


def torch_save(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def nan_weights() -> bytes:
    state = lenet().state_dict()
    state["0.bias"][0] = float("nan")
    return save(state)


def wrong_shapes() -> bytes:
    state = lenet().state_dict()
    state["11.weight"] = torch.zeros(7, 84)
    return save(state)


def exported() -> bytes:
    """A program of torch.export whose symbolic sizes are code."""
    buffer = io.BytesIO()
    example = torch.zeros(2, 1, 28, 28)
    program = torch.export.export(lenet().eval(), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, buffer)
    code = f"__import__('os').system('touch {PROOF}')"
    with zipfile.ZipFile(buffer) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    model = next(name for name in files if name.endswith("models/model.json"))
    tree = json.loads(files[model])
    tree["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = code
    files[model] = json.dumps(tree).encode()
    spoiled = io.BytesIO()
    with zipfile.ZipFile(spoiled, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return spoiled.getvalue()


def remote_code() -> bytes:
    config = {"model_type": "bert", "architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}}
    return zipped(**{"config.json": json.dumps(config).encode(), "model.safetensors": weights()})


def huge_array() -> bytes:
    return zipped(**{"train_inputs.npy": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }")})


@dataclass(frozen=True)
class Garbage:
    """One kind: what it is sent as, its bytes, and a word that the sentence must hold."""

    kind: str
    name: str
    body: Callable[[], bytes]
    word: str
    spec: dict[str, Any] | None = None


KINDS = {
    "empty model": Garbage("models", "m.safetensors", lambda: b"", "empty", SPEC),
    "truncated safetensors": Garbage("models", "m.safetensors", lambda: weights()[:-1000], "safetensors", SPEC),
    "safetensors header of 2^60 bytes": Garbage(
        "models", "m.safetensors", lambda: struct.pack("<Q", 1 << 60) + b"{}", "header", SPEC
    ),
    "whole pickled module": Garbage("models", "m.pt", lambda: torch_save(lenet()), "torch.export", SPEC),
    "pickle bomb": Garbage("models", "m.pt", lambda: pickle.dumps(Bomb(str(PROOF))), "pickle", SPEC),
    "weights of wrong shapes": Garbage("models", "m.safetensors", wrong_shapes, "11.weight", SPEC),
    "weights with NaN": Garbage("models", "m.safetensors", nan_weights, "0.bias", SPEC),
    "web page": Garbage("models", "m.safetensors", lambda: b"<!doctype html><html></html>" * 9, "HTML", SPEC),
    "architecture without spec": Garbage("models", "m.safetensors", weights, "architecture"),
    "unknown field in the spec": Garbage("models", "m.safetensors", weights, "spec", SPEC | {"colour": "red"}),
    "layer that holds code": Garbage(
        "models",
        "m.safetensors",
        weights,
        "layers",
        SPEC | {"architecture": {"layers": [{"type": "Lambda", "code": "import os"}]}},
    ),
    "path traversal": Garbage("models", "m.zip", lambda: zipped(**{"../../evil": b"x", "config.json": b"{}"}), ".."),
    "exported program with code for sizes": Garbage(
        "models", "m.pt2", exported, "symbolic size", {"task": SPEC["task"]}
    ),
    "remote code": Garbage("models", "m.zip", remote_code, "auto_map"),
    "zip bomb": Garbage("datasets", "d.zip", lambda: zipped(**{"train/a/x.png": b"\0" * (300 << 20)}), "unpack"),
    "empty dataset": Garbage("datasets", "d.npz", lambda: b"", "empty"),
    "pickled array": Garbage(
        "datasets",
        "d.npz",
        lambda: npz(train_inputs=np.array([Bomb(str(PROOF))], dtype=object)),
        "object",
    ),
    "counts that differ": Garbage(
        "datasets",
        "d.npz",
        lambda: npz(train_inputs=np.zeros((4, 1, 28, 28), np.float32), train_targets=np.zeros(3, np.int64)),
        "train",
    ),
    "picture that is none": Garbage(
        "datasets", "d.zip", lambda: zipped(**{"train/a/x.png": b"\x89PNG\r\n\x1a\nnot really"}), "x.png"
    ),
    "JSON Lines that is none": Garbage(
        "datasets", "d.jsonl", lambda: b'{"text": "good", "label": 1}\n{"text": \n', "line 2"
    ),
    "program with a pickled weight": Garbage(
        "models", "m.pt2", lambda: programs.in_a_weight(PROOF), "marked as a pickle", IMAGES
    ),
    "program with code in an expression": Garbage(
        "models", "m.pt2", lambda: programs.in_an_expression(PROOF), "__import__", IMAGES
    ),
    "ONNX that asks for terabytes": Garbage(
        "models", "m.onnx", lambda: onnx_files.huge_value().SerializeToString(), "would take", IMAGES
    ),
    "ONNX with data above its archive": Garbage(
        "models", "m.zip", lambda: onnx_files.packed(packed_zip, "../w.bin"), "..", IMAGES
    ),
    "ONNX with data behind a link": Garbage(
        "models", "m.tar", lambda: onnx_files.linked(tarfile.SYMTYPE), "a link or a device", IMAGES
    ),
    "tar with a hard link": Garbage(
        "datasets", "d.tar", lambda: tar_member(type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link or a device"
    ),
    "300,000 tensors": Garbage("models", "m.safetensors", lambda: many_tensors(300_000), "header", SPEC),
    "names twice": Garbage("models", "m.safetensors", twice_named, "twice", SPEC),
    "Parquet bomb": Garbage("datasets", "d.parquet", parquet.page_bomb, "unpacks to"),
    "PNG bomb": Garbage("datasets", "d.zip", lambda: zipped(**{"train/a/x.png": png_of(30_000, 30_000)}), "pixels"),
    "sound that lies": Garbage(
        "datasets",
        "d.zip",
        lambda: zipped(**{"a.wav": raw_wav(b"ab", size=1 << 30), "metadata.csv": b"file_name,label\na.wav,x\n"}),
        "promises 1073741824 bytes",
    ),
    "shard whose sound is none": Garbage(
        "datasets", "d.tar", lambda: tarred({"a.wav": b"RIFF", "a.cls": b"0"}, "w"), "a.wav"
    ),
    "array of a billion numbers": Garbage("datasets", "d.npz", huge_array, "needs 4000000000 bytes"),
    "deep JSON": Garbage("datasets", "d.jsonl", lambda: b'{"text": ' + b"[" * 100_000, "line 1"),
    "random bytes": Garbage("datasets", "d.npz", lambda: np.random.default_rng(0).bytes(5000), "dataset"),
}


def settle(url: str, record: dict[str, Any]) -> dict[str, Any]:
    """The record after its inspection."""
    deadline = time.monotonic() + INSPECTION_SECONDS
    while record["status"] == "inspecting" and time.monotonic() < deadline:
        time.sleep(0.05)
        record = httpx.get(
            f"{url}/v1/{'models' if record['id'].startswith('mdl') else 'datasets'}/{record['id']}"
        ).json()
    return record


@pytest.mark.parametrize("name", KINDS)
def test_garbage_is_refused_and_leaves_nothing(tersor: Service, name: str) -> None:
    garbage = KINDS[name]
    before = tersor.leftovers()
    params = {"filename": garbage.name}
    if garbage.spec is not None:
        params["spec"] = json.dumps(garbage.spec)
    answer = httpx.post(
        f"{tersor.url}/v1/{garbage.kind}",
        params=params,
        content=garbage.body(),
        headers={"Content-Type": "application/octet-stream"},
        timeout=INSPECTION_SECONDS,
    )
    if answer.status_code == httpx.codes.CREATED:
        record = settle(tersor.url, answer.json())
        assert record["status"] == "rejected", record
        problem = record["problem"]
    else:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
    assert problem["code"]
    assert garbage.word.lower() in json.dumps(problem).lower(), problem
    assert len(problem["detail"]) > 20, problem
    assert "Traceback" not in json.dumps(problem)
    assert str(tersor.data) not in json.dumps(problem)
    wait_for(lambda: tersor.leftovers() <= before)
    assert not PROOF.exists()


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[1]", 422, ""),
        (b'{"model": "mdl_\xff"}', 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": 7, "recipe": "int8"}', 422, "/model"),
        (b'{"model": "mdl_00000000000000000000000000", "recipe": "int8"}', 422, "/model"),
        (b'{"model": "mdl_00000000000000000000000000", "recipe": "best"}', 422, "/recipe"),
        (b'{"model": "mdl_00000000000000000000000000", "recipe": "int8", "speed": 9}', 422, "/speed"),
        (
            b'{"model": "mdl_00000000000000000000000000", "steps": [{"technique": "prune", "sparsity": 2}]}',
            422,
            "/steps/0/sparsity",
        ),
    ],
)
def test_a_garbled_job_is_a_problem_with_a_pointer(
    tersor: Service, body: bytes, status: int, pointer: str | None
) -> None:
    answer = httpx.post(f"{tersor.url}/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"]
    if pointer is not None:
        assert (answer.json().get("pointer") or "") == pointer


def test_a_body_cut_short_leaves_nothing(tersor: Service) -> None:
    before = tersor.leftovers()

    def cut() -> Any:
        yield b"x" * (1 << 20)
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        httpx.post(f"{tersor.url}/v1/models", content=cut(), headers={"Content-Type": "application/octet-stream"})
    wait_for(lambda: tersor.leftovers() <= before)


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; fails when it does not within a generous time."""
    deadline = time.monotonic() + INSPECTION_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
