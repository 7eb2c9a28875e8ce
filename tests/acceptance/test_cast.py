"""Narrower floats over HTTP: half of the bytes, and the accuracy that the report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run, upload
from tests.acceptance.test_main_job import recompute


def test_halves_are_delivered_and_counted(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    step = {"technique": "quantize", "method": "cast", "dtype": "float16"}
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        done, report = run(client, model, dataset, steps=[step], export=["native", "onnx"])
        files = {
            item["name"]: client.download(done["id"], item["name"], tmp_path) for item in client.artifacts(done["id"])
        }
    native, graph = report["artifacts"]
    assert {tensor.dtype for tensor in load_file(files["model.safetensors"]).values()} == {np.dtype(np.float16)}
    held = {one.name: one.data_type for one in onnx.load(files["model.onnx"]).graph.initializer}
    assert {held[name] for name in held if name.endswith("weight")} == {TensorProto.FLOAT16}
    for one in (native, graph):
        assert one["size_ratio"] > 1.9
        assert {layer["bits"] for layer in one["measurement"]["layers"]} == {16}
        found = recompute(files[one["name"]], lenet / "mnist.npz")
        assert found == pytest.approx(one["measurement"]["metric"]["value"])
