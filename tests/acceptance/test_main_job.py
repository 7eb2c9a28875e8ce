"""The main job, end to end, on real input: upload, optimize, download, reload in a fresh process, recompute."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image
from safetensors.numpy import load_file, save

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run, upload

DISTILLED = {"epochs": 2, "lr": 1e-3, "schedule": "cosine", "distill": {"temperature": 4, "alpha": 0.7}}
MAIN_STEPS = [
    {"technique": "prune", "sparsity": 0.8, "schedule": "cubic", "training": DISTILLED},
    {"technique": "quantize", "method": "static"},
]


def recompute(path: Path, data: Path) -> float:
    """The accuracy of a file, by code that is not Tersor's, in a fresh process."""
    command = [sys.executable, "-m", "worker.demo.recompute", str(path), str(data)]
    counted = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return counted["correct"] / counted["samples"]


def test_the_demo_passes_from_a_terminal() -> None:
    """`tersor demo` exits with 0 only if every recomputed figure equals the report's."""
    done = subprocess.run([sys.executable, "-m", "app.cli", "demo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every recomputed figure equals the report's." in done.stdout


def test_prune_distil_quantize(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        inspected = client.model(model, wait=30)
        client.dataset(dataset, wait=30)
        planned = client.dry_run({"model": model, "dataset": dataset, "steps": MAIN_STEPS})
        done, report = run(client, model, dataset, steps=MAIN_STEPS, seed=3)
        assert done["progress"] == 1
        assert done["attempt"] == 1
        artifacts = {item["name"]: item for item in client.artifacts(done["id"])}
        files = {name: client.download(done["id"], name, tmp_path) for name in artifacts}
    assert set(files) == {"model.safetensors", "model.onnx"} == {item["name"] for item in planned["artifacts"]}
    assert planned["steps"] == done["steps"]
    assert planned["estimate"]["seconds"] > 0
    assert sum(layer["macs"] for layer in inspected["layers"]) == inspected["cost"]["macs"]
    # A row of layers has no block that gives the shape that it takes.
    assert {entry["technique"] for entry in inspected["techniques"] if not entry["applies"]} == {"resize"}
    measured = {item["name"]: item for item in report["artifacts"]}
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == artifacts[name]["sha256"] == measured[name]["sha256"]
        assert measured[name]["measurement"]["metric"]["samples"] == 1000
        assert measured[name]["measurement"]["metric"]["split"] == "test"
        assert recompute(path, lenet / "mnist.npz") == pytest.approx(measured[name]["measurement"]["metric"]["value"])
    assert recompute(lenet / "lenet.safetensors", lenet / "mnist.npz") == pytest.approx(
        report["uploaded"]["metric"]["value"]
    )
    _check_sparsity(files["model.safetensors"], measured["model.safetensors"]["measurement"])
    _check_int8(files["model.onnx"], measured["model.onnx"]["measurement"])
    assert report["spec"]["steps"][0]["scope"] == "global"  # every default is filled in
    assert report["seed"] == 3
    assert any("zeros" in warning for warning in report["warnings"])  # the dense file did not get smaller


def _check_sparsity(path: Path, measurement: dict[str, Any]) -> None:
    state = load_file(path)
    weights = [tensor for name, tensor in state.items() if name.endswith("weight")]
    total = sum(tensor.size for tensor in weights)
    assert sum(int((tensor == 0).sum()) for tensor in weights) == round(0.8 * total)
    assert measurement["parameters"] == sum(tensor.size for tensor in state.values())
    assert measurement["nonzero_parameters"] == sum(int(np.count_nonzero(tensor)) for tensor in state.values())
    # LeNet-5 by hand: 28*28*6*25 + 10*10*16*150 + 400*120 + 120*84 + 84*10
    assert measurement["macs"] == 117_600 + 240_000 + 48_000 + 10_080 + 840


def _check_int8(path: Path, measurement: dict[str, Any]) -> None:
    graph = onnx.load(path).graph
    int8 = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8]
    stored = [tensor for tensor in int8 if not tensor.name.endswith("_zero_point")]
    assert sum(int(np.prod(tensor.dims)) for tensor in stored) == 61_470  # every weight of LeNet-5
    assert measurement["macs"] == 416_520
    layers = [layer for layer in measurement["layers"] if len(layer["shape"]) > 1]
    assert {layer["bits"] for layer in layers} == {8}
    assert all(layer["sqnr_db"] > 20 for layer in layers)
    zeros = sum(layer["sparsity"] * layer["parameters"] for layer in layers)
    assert zeros >= 0.8 * 61_470 - 1  # pruned weights stay exact zeros in int8


def test_the_same_seed_gives_the_same_bytes(tersor: Service, lenet: Path) -> None:
    steps = [{"technique": "prune", "sparsity": 0.5, "training": {"steps": 20, "distill": {}}}]
    digests = []
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        for _ in range(2):
            done, _ = run(client, model, dataset, steps=steps, seed=5, export=["native"])
            digests.append([item["sha256"] for item in client.artifacts(done["id"])])
    assert digests[0] == digests[1]


def test_int8_needs_only_calibration_data(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    with np.load(lenet / "mnist.npz") as arrays:
        np.savez(tmp_path / "calibration.npz", calibration_inputs=arrays["train_inputs"][:200])
    with tersor.client() as client:
        model, _ = upload(client, lenet)
        dataset = client.upload_dataset(tmp_path / "calibration.npz")["id"]
        done, report = run(client, model, dataset, recipe="int8")
        path = client.download(done["id"], "model.onnx", tmp_path)
    assert report["uploaded"]["metric"] is None  # nothing labelled, so no accuracy is claimed
    assert any("label" in warning for warning in report["warnings"])
    uploaded = recompute(lenet / "lenet.safetensors", lenet / "mnist.npz")
    assert recompute(path, lenet / "mnist.npz") >= uploaded - 0.01


def test_the_worked_example_runs_as_a_recipe(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    """conv 3->64, conv 64->128, global pooling, linear 128->10 on an image folder of real digits in colour."""
    layers = [
        {"type": "Conv2d", "in_channels": 3, "out_channels": 64, "kernel_size": 3, "padding": 1},
        {"type": "ReLU"},
        {"type": "Conv2d", "in_channels": 64, "out_channels": 128, "kernel_size": 3, "padding": 1},
        {"type": "ReLU"},
        {"type": "AdaptiveAvgPool2d", "output_size": 1},
        {"type": "Flatten"},
        {"type": "Linear", "in_features": 128, "out_features": 10},
    ]
    spec = {
        "task": "image-classification",
        "architecture": {"layers": layers},
        "input": {"shape": [3, 14, 14], "dtype": "float32"},
        "labels": list("0123456789"),
    }
    rng = np.random.default_rng(0)
    shapes = {"0": (64, 3, 3, 3), "2": (128, 64, 3, 3), "6": (10, 128)}
    state = {}
    for name, shape in shapes.items():
        bound = 1 / np.sqrt(np.prod(shape[1:]))
        state[f"{name}.weight"] = rng.uniform(-bound, bound, shape).astype(np.float32)
        state[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    (tmp_path / "example.safetensors").write_bytes(save(state))
    (tmp_path / "digits.zip").write_bytes(_coloured_digits(lenet / "mnist.npz"))
    with tersor.client() as client:
        model = client.upload_model(tmp_path / "example.safetensors", spec)["id"]
        dataset = client.upload_dataset(tmp_path / "digits.zip")["id"]
        done, report = run(client, model, dataset, recipe="threshold-int8")
        path = client.download(done["id"], "model.onnx", tmp_path)
    prune, quantize = report["spec"]["steps"]
    assert (prune["threshold"], prune["training"]["lr"], prune["training"]["epochs"]) == (0.01, 0.001, 10)
    assert quantize["dtype"] == "int8"
    (native, int8) = (item["measurement"] for item in report["artifacts"])
    expected = sum(int((np.abs(state[f"{name}.weight"]) < 0.01).sum()) for name in shapes)
    zeros = sum(round(layer["sparsity"] * layer["parameters"]) for layer in native["layers"] if len(layer["shape"]) > 1)
    assert zeros == expected
    assert int8["size_bytes"] == path.stat().st_size < 0.4 * report["uploaded"]["size_bytes"]
    assert int8["metric"]["value"] > report["uploaded"]["metric"]["value"]  # it was untrained, now it is trained


def _coloured_digits(data: Path) -> bytes:
    buffer = io.BytesIO()
    with np.load(data) as arrays, zipfile.ZipFile(buffer, "w") as archive:
        for split, count in (("train", 300), ("test", 100)):
            for i in range(count):
                grey = (arrays[f"{split}_inputs"][i, 0, ::2, ::2] * 255).astype(np.uint8)
                picture = io.BytesIO()
                Image.fromarray(np.stack([grey, grey, 255 - grey], axis=-1)).save(picture, "PNG")
                archive.writestr(f"{split}/{arrays[f'{split}_targets'][i]}/{i}.png", picture.getvalue())
    return buffer.getvalue()
