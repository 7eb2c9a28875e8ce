"""Layers of an int8 file that stay floating point: a layer that was made fragile, on real digits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from app.contract.spec import Quantize
from tests.worker.conftest import OnnxExport
from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.context import Context
from worker.data.base import Data
from worker.data.batch import Inputs
from worker.evaluation.artifact import OnnxFile
from worker.export.registry import Exported, write_onnx
from worker.loading.onnx_session import GraphSession
from worker.model import Model
from worker.techniques.quantization.leaving import Candidate, Limit, candidates, leave
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.stored import stored_weights

FRAGILE = "3"  # the second convolution


def limit_of(scores: dict[frozenset[str], float], wanted: float, made: list[frozenset[str]]) -> tuple[Limit, Any]:
    """Files that hold the names that are left, a score for each such set, and outputs that miss by a layer's worth."""
    noise = {"a": 0.3, "b": 0.1, "c": 0.2}

    def make(left: Collection[str], target: Path) -> None:
        target.write_text(",".join(sorted(left)))
        made.append(frozenset(left))

    def opened(file: Path) -> Any:
        left = set(file.read_text().split(",")) if file.name != "float" else set(noise)
        missed = sum(own for name, own in noise.items() if name not in left)

        def forward(inputs: Any) -> np.ndarray:
            return np.array([10.0, 10.0 + missed])

        forward.left = frozenset(left - {""})  # type: ignore[attr-defined]
        return forward

    def judge(forward: Any) -> float:
        return scores.get(forward.left, 0.0)

    return Limit(wanted, judge, lambda metric: metric, opened, lambda: [()]), make


LAYERS = [Candidate("a", ("a",)), Candidate("b", ("b",)), Candidate("c", ("c",), weight=False)]
ALL, HURT = frozenset("abc"), [frozenset("a"), frozenset("ac"), frozenset("abc")]


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ({frozenset(): 0.9}, []),
        ({HURT[0]: 0.9, HURT[1]: 0.9, ALL: 0.9}, ["a"]),
        ({HURT[1]: 0.9, ALL: 0.95}, ["a", "c"]),
        ({ALL: 0.9}, ["a", "c", "b"]),
        ({}, ["a", "c", "b"]),
    ],
    ids=["none", "one", "two", "all", "in vain"],
)
def test_those_that_hurt_most_are_left_and_no_more(
    scores: dict[frozenset[str], float], left: list[str], tmp_path: Path
) -> None:
    made: list[frozenset[str]] = []
    limit, make = limit_of(scores, 0.9, made)
    found, details = leave(LAYERS, make, limit, tmp_path / "float", tmp_path / "target")
    assert found == left
    assert made[-1] == frozenset(left)
    assert details["held"] is bool(scores)
    assert details["layers_int8"] == 2 - len(set(left) & {"a", "b"})  # c is a product of activations
    rows = details["layers_left_in_float"]
    assert isinstance(rows, list)
    noise = {"a": 0.3, "b": 0.1, "c": 0.2}
    assert [(row["name"], row["noise"]) for row in rows] == [
        (name, pytest.approx(noise[name] ** 2 / 200)) for name in left
    ]
    tried = details["searched"]
    assert isinstance(tried, list)
    assert len(tried) == len({row["left_in_float"] for row in tried}) <= 4


def fragile(trained: Model, mnist: Data, scratch: Path) -> Context:
    """The LeNet with a convolution whose inputs reach very far in one channel, which the next makes up for: eight bits
    that the channels share leave little of the others. The network gives what it gave."""
    module = copy.deepcopy(trained.module)
    first, second = module.get_submodule("0"), module.get_submodule(FRAGILE)
    with torch.no_grad():
        first.get_parameter("weight")[0] *= 3000.0
        first.get_parameter("bias")[0] *= 3000.0
        second.get_parameter("weight")[:, 0] /= 3000.0
    data = memory_data(
        {
            "calibration": (mnist.splits["calibration"].inputs, None),  # type: ignore[attr-defined]
            "validation": (mnist.splits["validation"].inputs, mnist.splits["validation"].targets),  # type: ignore[attr-defined]
        }
    )
    return context_for(tiny_model(module, shape=(1, 28, 28)), data, scratch)


def exported(context: Context, folder: Path, **fields: Any) -> tuple[Exported, float]:
    """The file of a step, and its accuracy on validation."""
    folder.mkdir()
    context.int8 = None
    # Without what would make up for the fragile layer.
    plain = {"smooth": False, "equalize": False, "calibration": {"samples": 64}}
    context.quantization = Quantize.model_validate(plain | fields)
    made = write_onnx(context.model.module, context, folder)
    assert made.reference is not None
    assert context.feed is not None
    file = OnnxFile(made.path, made.reference, context.model.facts, 1)
    return made, context.feed.score(file, "validation")[0]


def floats_of(path: Path) -> set[str]:
    return {weight.name.removesuffix(".weight") for weight in stored_weights(onnx.load(path)) if weight.bits == 32}


def test_static_leaves_the_layer_that_hurts(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    context = fragile(trained_lenet, mnist, tmp_path)
    assert context.feed is not None
    wanted = context.feed.score(lambda inputs: context.teacher(*inputs), "validation")[0] - 0.01
    plain, lost = exported(context, tmp_path / "plain")
    assert lost < wanted - 0.02
    assert not floats_of(plain.path)
    made, found = exported(context, tmp_path / "held", max_accuracy_drop=0.01)
    details = made.details
    assert found == pytest.approx(details["validation_metric"])
    assert details["held"]
    assert details["wanted_validation_metric"] == pytest.approx(wanted)
    assert found >= wanted
    assert details["validation_metric_all_int8"] == pytest.approx(lost)
    rows = details["layers_left_in_float"]
    assert isinstance(rows, list)
    left = {str(row["name"]) for row in rows}
    assert floats_of(made.path) == left
    assert FRAGILE in left or "0" in left
    assert 0 < len(left) < 5
    assert details["layers_int8"] == 5 - len(left)
    # And their weights are those of the float file, not rounded ones.
    assert made.floats is not None
    exact = {weight.name: weight.values for weight in stored_weights(onnx.load(made.floats))}
    for weight in stored_weights(onnx.load(made.path)):
        if weight.bits == 32:
            np.testing.assert_array_equal(weight.values, exact[weight.name])


def test_dynamic_holds_as_it_is_and_says_so(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    context = fragile(trained_lenet, mnist, tmp_path)
    made, _ = exported(context, tmp_path / "held", method="dynamic", max_accuracy_drop=0.01)
    assert made.details["held"]
    assert made.details["layers_left_in_float"] == []
    assert made.details["layers_int8"] == 3  # convolutions are none of its layers
    assert floats_of(made.path) == {"0", "3"}


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_where_floats_do_not_hold_either_all_stay_floats(
    method: str, trained_lenet: Model, mnist: Data, tmp_path: Path
) -> None:
    """An earlier step has lost what no layer can give back."""
    context = context_for(copy.copy(trained_lenet), mnist, tmp_path)
    module = copy.deepcopy(trained_lenet.module)
    with torch.no_grad():
        module.get_submodule("11").get_parameter("weight")[::2] = 0.0
    context.model = tiny_model(module, shape=(1, 28, 28))
    made, found = exported(context, tmp_path / "held", method=method, max_accuracy_drop=0.0)
    assert made.details["held"] is False
    assert made.details["layers_int8"] == 0
    assert floats_of(made.path) == {"0", "3", "7", "9", "11"}
    assert found == pytest.approx(context.feed.score(lambda inputs: module(*inputs), "validation")[0], abs=1e-6)  # type: ignore[union-attr]


def test_candidates_are_weights_by_layer_and_products_of_activations() -> None:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "q.weight"], ["q"], "first"),
        onnx.helper.make_node("MatMul", ["x", "q.weight"], ["k"], "second"),
        onnx.helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        onnx.helper.make_node("MatMul", ["scores", "out.weight"], ["y"], "out"),
    ]
    held = [onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("q.weight", "out.weight")]
    graph = onnx.helper.make_graph(nodes, "g", [], [], held)
    weight = Candidate("q", ("first", "second"))
    assert candidates(graph, ("MatMul",), ["out"]) == [weight, Candidate("scores", ("scores",), weight=False)]
    assert candidates(graph, ("MatMul",), ["out"], products=False) == [weight]


def test_where_dynamic_holds_nothing_of_a_transformer_it_is_delivered_in_floats(
    zoo: Callable[[str], OnnxExport], tmp_path: Path
) -> None:
    """Its products of activations are floats in any case, and count as no layers."""
    source = tmp_path / "float.onnx"
    source.write_bytes(zoo("bert").path.read_bytes())
    limit = Limit(1.0, lambda forward: 0.0, lambda metric: metric, _run, lambda: [_tokens()])
    step = Quantize(method="dynamic", max_accuracy_drop=0.0)
    made = quantize_file(source, tmp_path / "int8.onnx", step, None, (), limit)
    assert made.details["held"] is False
    assert made.details["layers_int8"] == 0
    assert {weight.bits for weight in stored_weights(onnx.load(made.path))} == {32}


def _tokens() -> Inputs:
    torch.manual_seed(0)
    return torch.randint(0, 100, (4, 20)), torch.ones(4, 20, dtype=torch.int64)


def _run(file: Path) -> Callable[[Inputs], np.ndarray]:
    session = GraphSession(file, ["input_ids", "attention_mask"], 1)
    return session
