"""ONNX files over HTTP: a graph that trains, and one whose control flow cannot be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from app.client import Client, ClientError
from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run as run_job
from tests.worker.helpers import MemorySplit, digits_data
from tests.worker.loading.onnx_files import model, noise, run
from tests.worker.test_run_onnx import digits_graph


def digits(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Real digits of 8x8 as arrays."""
    arrays = {}
    for name, split in digits_data((1, 8, 8)).splits.items():
        assert isinstance(split, MemorySplit)
        arrays[f"{name}_inputs"] = split.inputs.numpy()
        if split.targets is not None:
            arrays[f"{name}_targets"] = split.targets.numpy()
    np.savez(folder / "digits.npz", **arrays)
    return folder / "digits.npz", arrays


def perceptron(path: Path) -> Path:
    """An untrained network of one hidden layer that ends in probabilities."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Gemm", ["flat", "hidden.weight", "hidden.bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "out.weight", "out.bias"], ["z"]),
        helper.make_node("Softmax", ["z"], ["chances"]),
    ]
    held = {"hidden.weight": noise(64, 48) / 8, "hidden.bias": noise(48) / 8, "out.weight": noise(48, 10) / 8}
    proto = model(nodes, {"pixels": ["n", 1, 8, 8]}, held | {"out.bias": noise(10) / 8}, outputs=["chances"], opset=17)
    onnx.save_model(proto, str(path))
    return path


def inspected(client: Client, path: Path) -> dict[str, Any]:
    """The uploaded model, once a worker has looked at it."""
    uploaded = client.upload_model(path, {"task": "image-classification"})
    found = client.model(uploaded["id"], wait=60)
    assert found["status"] == "ready", found["problem"]
    return found


def test_a_graph_learns_and_becomes_int8(tersor: Service, tmp_path: Path) -> None:
    data, arrays = digits(tmp_path)
    steps = [
        {"technique": "finetune", "training": {"epochs": 6, "lr": 5e-3}},
        {"technique": "quantize", "method": "static"},
    ]
    with tersor.client() as client:
        uploaded = inspected(client, perceptron(tmp_path / "m.onnx"))
        assert (uploaded["format"], uploaded["trainable"], uploaded["output_kind"]) == ("onnx", True, "softmax")
        dataset = client.upload_dataset(data)["id"]
        done, report = run_job(client, uploaded["id"], dataset, steps=steps)
        for one in report["artifacts"]:
            path = client.download(done["id"], one["name"], tmp_path)
            chances = run(onnx.load(path), {"pixels": arrays["test_inputs"]})
            np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)
            right = float(np.mean(chances.argmax(1) == arrays["test_targets"]))
            assert one["measurement"]["metric"]["value"] == pytest.approx(right, abs=1e-9)
            assert right > 0.85
            assert one["measurement"]["runtime"] == report["uploaded"]["runtime"] == "onnxruntime"


OF_LINEAR_LAYERS = (
    "dynamic",
    "weight_only",
    "mixed",
    "qat",
    "cast",
)  # or of what can be trained; the graph has neither


def test_control_flow_says_which_techniques_are_left(tersor: Service, tmp_path: Path) -> None:
    onnx.save_model(digits_graph(), str(tmp_path / "m.onnx"))
    data, _ = digits(tmp_path)
    with tersor.client() as client:
        uploaded = inspected(client, tmp_path / "m.onnx")
        others = [one for one in uploaded["techniques"] if one["method"] not in (*OF_LINEAR_LAYERS, "structured")]
        applies = {one["technique"]: one["applies"] for one in others}
        left = {"prune": True, "quantize": True}
        assert applies == left | dict.fromkeys(
            ("finetune", "distill", "compress", "factorize", "resize", "fuse"), False
        )
        assert "control flow (If)" in uploaded["untrainable_reason"]
        dataset = client.upload_dataset(data)["id"]
        client.dataset(dataset, wait=60)  # what is known of both is refused at once
        with pytest.raises(ClientError) as caught:
            run_job(client, uploaded["id"], dataset, steps=[{"technique": "finetune"}])
        assert (caught.value.code, caught.value.problem["pointer"]) == ("unsupported", "/steps/0")
        _, report = run_job(client, uploaded["id"], dataset, steps=[{"technique": "prune", "sparsity": 0.5}])
        assert report["steps"][0]["details"]["sparsity"] == 0.5
