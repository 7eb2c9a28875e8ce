"""Training with rounding, and few bits as programs of torch, over HTTP: files that a process with torch alone reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run, upload
from tests.worker import fresh
from tests.worker.loading.onnx_files import run as run_graph

pytestmark = pytest.mark.slow

QAT = {"technique": "quantize", "method": "qat", "training": {"steps": 30}}


def accuracy(outputs: Any, targets: Any) -> float:
    return float((outputs.argmax(1) == targets).mean())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_trained_rounding_is_in_both_files(tersor: Service, lenet: Path, tmp_path: Path, bits: int) -> None:
    with np.load(lenet / "mnist.npz") as data:
        inputs, targets = data["test_inputs"], data["test_targets"]
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        done, report = run(client, model, dataset, steps=[QAT | {"bits": bits}], export=["onnx", "pt2"])
        graph = client.download(done["id"], "model.onnx", tmp_path)
        program = client.download(done["id"], "program.pt2", tmp_path)
    details, (of_graph, of_program) = report["steps"][0]["details"], report["artifacts"]
    assert details["method"] == "qat"
    assert {row["bits"] for row in details["layers"]} == {bits}
    assert {layer["bits"] for layer in of_program["measurement"]["layers"]} == {bits}
    right = accuracy(run_graph(onnx.load(graph), {"input": inputs}), targets)
    assert of_graph["measurement"]["metric"]["value"] == pytest.approx(right, abs=1e-9)
    found = fresh.answers("program", program, inputs, tmp_path, 256)
    assert of_program["measurement"]["metric"]["value"] == pytest.approx(accuracy(found, targets), abs=2e-3)
    assert right > report["uploaded"]["metric"]["value"] - 0.02
    assert of_program["measurement"]["size_bytes"] < report["uploaded"]["size_bytes"]
    told = of_program["details"]
    assert "compiled_median_s" in told or "not_compiled" in told


def test_few_bits_with_zero_points_that_are_no_whole_numbers(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    with np.load(lenet / "mnist.npz") as data:
        inputs, targets = data["test_inputs"], data["test_targets"]
    with tersor.client() as client:
        model, _ = upload(client, lenet)
        step = {"technique": "quantize", "method": "weight_only", "bits": 3, "algorithm": "hqq", "group_size": 32}
        done, _ = run(client, model, None, steps=[step], export=["native", "onnx", "pt2"])  # no data
        paths = {name: client.download(done["id"], name, tmp_path) for name in ("model.onnx", "program.pt2")}
    program = fresh.answers("program", paths["program.pt2"], inputs, tmp_path, 256)
    graph = run_graph(onnx.load(paths["model.onnx"]), {"input": inputs})
    assert accuracy(program, targets) > 0.9
    assert accuracy(graph, targets) == pytest.approx(accuracy(program, targets), abs=0.01)  # whose inputs are rounded
