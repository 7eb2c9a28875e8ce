"""Limits that bits, or layers left in float, are found for: over HTTP, on real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from app.client import ClientError
from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run, upload
from tests.worker.loading.onnx_files import run as run_graph

MIXED = {"technique": "quantize", "method": "mixed", "symmetric": True, "algorithm": "rtn", "samples": 64}


def test_the_fewest_bytes_that_hold_the_accuracy(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    with np.load(lenet / "mnist.npz") as data:
        inputs, targets = data["test_inputs"], data["test_targets"]
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        step = MIXED | {"max_accuracy_drop": 0.01}
        done, report = run(client, model, dataset, steps=[step], export=["packed", "onnx"])
        path = client.download(done["id"], "model.onnx", tmp_path)
        _, int8 = run(
            client,
            model,
            dataset,
            steps=[{"technique": "quantize", "max_accuracy_drop": 0.01, "calibration": {"samples": 64}}],
            export=["onnx"],
        )
    details = report["steps"][0]["details"]
    assert details["held"]
    assert details["validation_metric"] >= details["wanted_validation_metric"]
    # Which bits a layer needs hangs on the training's sums, which processors round in ways of their own.
    assert {row["bits"] for row in details["layers"]} <= {2, 3, 4, 8}
    assert min(row["bits"] for row in details["layers"]) < 8
    packed, graph = report["artifacts"]
    biases = 4 * (6 + 16 + 120 + 84 + 10)
    assert packed["measurement"]["size_bytes"] <= details["bytes"] + biases + 1200  # names, shapes, tables
    assert details["size"] < 0.2
    right = float((run_graph(onnx.load(path), {"input": inputs}).argmax(1) == targets).mean())
    assert graph["measurement"]["metric"]["value"] == pytest.approx(right, abs=1e-9)
    assert right > report["uploaded"]["metric"]["value"] - 0.03
    (artifact,) = int8["artifacts"]
    assert artifact["details"]["held"]
    assert artifact["details"]["searched"][0]["left_in_float"] == 0


def test_limits_without_data_and_beyond_reach_are_problems(tersor: Service, lenet: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        client.model(model, wait=60)
        client.dataset(dataset, wait=60)
        with pytest.raises(ClientError) as caught:
            client.submit({"model": model, "steps": [MIXED | {"max_size": 0.2}]})
        assert caught.value.problem["pointer"] == "/dataset"
        with pytest.raises(ClientError) as caught:
            client.submit({"model": model, "dataset": dataset, "steps": [MIXED]})
        assert "exactly one of max_size, max_latency and max_accuracy_drop" in str(caught.value.problem)
        spec = {"model": model, "dataset": dataset, "steps": [MIXED | {"max_size": 0.05}]}
        failed = client.wait(client.submit(spec)["id"])
        assert failed["state"] == "failed"
        assert failed["error"]["pointer"] == "/steps/0"
        assert "more than the max_size of 0.05" in failed["error"]["detail"]


@pytest.mark.slow
def test_a_limit_of_time_holds_or_is_refused_with_the_time_that_there_is(tersor: Service, lenet: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        _, report = run(client, model, dataset, steps=[MIXED | {"max_latency": 1.0}], export=["onnx"])
        spec = {"model": model, "dataset": dataset, "steps": [MIXED | {"max_latency": 0.01}], "export": ["onnx"]}
        refused = client.wait(client.submit(spec)["id"])
    details = report["steps"][0]["details"]
    assert 0 < details["seconds"] <= details["seconds_as_floats"]
    assert details["latency"] == pytest.approx(details["seconds"] / details["seconds_as_floats"])
    why = {row["name"]: row["why"] for row in details["layers_left_in_float"]}
    assert why["0.weight"] == why["3.weight"] == "no product that a sample reaches: bits save no time"
    assert refused["state"] == "failed"
    assert refused["error"]["pointer"] == "/steps/0"
    assert "of the time of floats" in refused["error"]["detail"]
