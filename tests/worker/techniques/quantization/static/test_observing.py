"""What is seen of a graph's inner tensors, and what a session holds for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper, shape_inference

from tests.worker.techniques.quantization.static.graphs import floats, graph_of
from worker.data.batch import Batch
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.static import observing
from worker.techniques.quantization.static.observing import Observed


@pytest.fixture
def batches() -> list[np.ndarray]:
    return [floats(4, 6), floats(4, 6)]


@pytest.fixture
def observed(batches: list[np.ndarray]) -> Observed:
    """y = relu(2 x + 1) - 1."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["a"]),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Sub", ["c", "one"], ["y"]),
    ]
    given = {"one": np.ones(1, np.float32), "two": np.full(1, 2, np.float32)}
    proto = shape_inference.infer_shapes(graph_of(nodes, given, ["n", 6], ["y"]))
    samples = Samples(lambda: [Batch((torch.from_numpy(batch),), None) for batch in batches], ["x"], len(batches))
    return Observed(proto, samples)


def test_tensors_are_those_of_every_batch(observed: Observed, batches: list[np.ndarray]) -> None:
    assert observed.tensors == {"x", "a", "b", "c", "y"}
    for names in (["b"], ["x", "c"], ["x"], ["y", "a"]):
        for x, found in zip(batches, observed.watch(names), strict=True):
            c = np.maximum(2 * x + 1, 0)
            expected = {"x": x, "a": 2 * x, "b": 2 * x + 1, "c": c, "y": c - 1}
            assert found.keys() == set(names)
            for name in names:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_a_session_has_no_outputs_that_nobody_asked_for(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold them all at once: gigabytes, where a transformer reads long texts."""
    opened: list[list[str]] = []
    session = observing._session

    def noted(proto: object) -> object:
        made = session(proto)  # type: ignore[arg-type]
        opened.append([value.name for value in made.get_outputs()])
        return made

    monkeypatch.setattr(observing, "_session", noted)
    for names in (["b"], ["b"], ["x"], ["c", "x", "y"]):
        list(observed.watch(names))
    assert opened == [["b"], ["c", "y"]]
