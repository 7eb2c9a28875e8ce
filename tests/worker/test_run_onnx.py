"""Whole jobs on uploaded ONNX files: trained ones, and those that run as they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from app.contract.distillation import Distill
from app.contract.errors import Unsupported
from app.contract.report import ArtifactReport, Report
from app.contract.spec import Finetune, Prune, Quantize, Step
from app.contract.training import Training
from tests.worker.helpers import MemorySplit, digits_data, part_of
from tests.worker.jobs import Recorder, request_for
from tests.worker.loading.files import zipped
from tests.worker.loading.onnx_files import model, noise, run
from tests.worker.nets import LENET_MACS
from worker.data.base import Data
from worker.model import Model
from worker.request import RunRequest
from worker.run import run_job

INT8_BYTES = 0.32  # of the upload: weights take a quarter, the rest is the graph
SMALL = {"train": 512, "test": 500, "calibration": 64}


def few(data: Data) -> Data:
    """A part of the digits, so that a job takes seconds."""
    return part_of(data, SMALL)


def job(folder: Path, content: bytes, data: Data | None, *steps: Step, **changes: Any) -> RunRequest:
    """A request on an uploaded file."""
    return request_for(folder, "model.onnx", content, {"task": "image-classification"}, data, steps, **changes)


def done(request: RunRequest) -> Report:
    return run_job(request, Recorder()).report


def artifact(report: Report, format: str) -> ArtifactReport:
    return next(one for one in report.artifacts if one.format == format)


def recomputed(path: Path, data: Data, name: str) -> float:
    """Accuracy on the test split, without any of the code under test."""
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    outputs = run(onnx.load(path), {name: split.inputs.numpy()})
    return float(np.mean(outputs.argmax(1) == split.targets.numpy()))


def metric(one: Any) -> float:
    found = one.measurement.metric if isinstance(one, ArtifactReport) else one.metric
    assert found is not None
    return float(found.value)


@pytest.fixture(scope="module")
def lenet_upload(trained_lenet: Model) -> bytes:
    """LeNet-5 by torch's older exporter, ending in probabilities, under names of its own."""
    buffer = io.BytesIO()
    network = nn.Sequential(trained_lenet.module, nn.Softmax(-1)).eval()
    names = {"input_names": ["pixels"], "output_names": ["chances"]}
    axes = {"pixels": {0: "n"}, "chances": {0: "n"}}
    torch.onnx.export(
        network, (torch.zeros(2, 1, 28, 28),), buffer, dynamo=False, opset_version=13, dynamic_axes=axes, **names
    )
    return buffer.getvalue()


pytestmark = [
    pytest.mark.usefixtures("known_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of that exporter, whose files are still made
]


def test_an_uploaded_graph_is_pruned_trained_and_quantized(lenet_upload: bytes, mnist: Data, tmp_path: Path) -> None:
    data = few(mnist)
    training = Training(steps=30, distill=Distill())
    steps = (
        Prune(sparsity=0.8, schedule="cubic", training=training),
        Finetune(training=Training(steps=10)),
        Quantize(),
    )
    request = job(tmp_path / "job", lenet_upload, data, *steps)
    report = done(request)
    assert (report.uploaded.runtime, report.uploaded.parameters, report.uploaded.macs) == (
        "onnxruntime",
        61_706,
        LENET_MACS,
    )
    assert metric(report.uploaded) == recomputed(request.model_path, data, "pixels")
    native, int8 = artifact(report, "native"), artifact(report, "onnx")
    assert (native.name, int8.name) == ("native.onnx", "model.onnx")
    for one in (native, int8):
        assert metric(one) == pytest.approx(recomputed(request.output / one.name, data, "pixels"), abs=1e-9)
        assert one.measurement.runtime == "onnxruntime"
        assert one.measurement.macs == LENET_MACS
        weights = [layer for layer in one.measurement.layers if len(layer.shape) > 1]
        zeros = sum(layer.sparsity * layer.parameters for layer in weights)
        assert zeros / sum(layer.parameters for layer in weights) >= 0.799
    assert int8.measurement.size_bytes < INT8_BYTES * report.uploaded.size_bytes
    assert {layer.bits for layer in int8.measurement.layers} == {8}
    assert metric(int8) > metric(report.uploaded) - 0.05
    _check_graphs(lenet_upload, request.output)


def _check_graphs(upload: bytes, output: Path) -> None:
    """The native file is the uploaded graph with other numbers; both files give probabilities under the same names."""
    before, native = onnx.load_from_string(upload), onnx.load(output / "native.onnx")
    assert [node.op_type for node in native.graph.node] == [node.op_type for node in before.graph.node]
    assert native.opset_import == before.opset_import
    for name in ("native.onnx", "model.onnx"):
        proto = onnx.load(output / name)
        onnx.checker.check_model(proto, full_check=True)
        assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["pixels", "chances"]
        np.testing.assert_allclose(run(proto, {"pixels": noise(3, 1, 28, 28)}).sum(1), 1, atol=1e-5)


def test_what_quantizes_alone_leaves_native_as_it_came(lenet_upload: bytes, mnist: Data, tmp_path: Path) -> None:
    request = job(tmp_path / "job", lenet_upload, few(mnist), Quantize())
    report = done(request)
    assert onnx.load(request.output / "native.onnx") == onnx.load_from_string(lenet_upload)
    assert artifact(report, "native").metric_change == 0
    # The upload's runtime is the artifacts' too: there is nothing else to compare with.
    for one in report.artifacts:
        assert one.speedup == pytest.approx(one.speedup_same_runtime)


def test_a_half_precision_graph_trains(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(trained_lenet.module).half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.half()).float()

    buffer = io.BytesIO()
    torch.onnx.export(
        Half().eval(),
        (torch.zeros(2, 1, 28, 28),),
        buffer,
        dynamo=False,
        opset_version=13,
        input_names=["pixels"],
        dynamic_axes={"pixels": {0: "n"}},
    )
    data = few(mnist)
    request = job(tmp_path / "job", buffer.getvalue(), data, Finetune(training=Training(steps=10)), Quantize())
    report = done(request)
    native = onnx.load(request.output / "native.onnx")
    assert {tensor.data_type for tensor in native.graph.initializer} == {TensorProto.FLOAT16}
    assert {layer.bits for layer in artifact(report, "native").measurement.layers} == {16}
    assert {layer.bits for layer in artifact(report, "onnx").measurement.layers} == {8}
    assert report.uploaded.parameters == 61_706
    assert metric(artifact(report, "onnx")) > metric(report.uploaded) - 0.05


# --- graphs that run as they are ----------------------------------------------------------------------------------


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def digits_graph(opset: int = 13, *, batch: int | str = "batch", constants: bool = False) -> ModelProto:
    """Digits of 8x8 in [0, 1]: convolution, Linear, and a choice of the last layer by the data."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    split = digits_data((1, 8, 8)).splits["train"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(split.inputs), split.targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    branches = {}
    for name in ("then_branch", "else_branch"):
        weight = numpy_helper.from_array(held["5.weight"].T.copy(), f"{name}_w")
        inner = [node("MatMul", ["r", f"{name}_w"], f"{name}_y")]
        graph = helper.make_graph(inner, name, [], [], [weight])
        graph.output.append(helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [batch, 10]))
        branches[name] = graph
    nodes = [
        node("Conv", ["x", "conv.weight", "conv.bias"], "c"),
        node("Relu", ["c"], "a"),
        node("Flatten", ["a"], "f"),
        node("Gemm", ["f", "fc.weight", "fc.bias"], "h", transB=1),
        node("Relu", ["h"], "r"),
        node("ReduceMax", ["r"], "m", keepdims=0),
        node("Greater", ["m", "limit"], "which"),
        node("If", ["which"], "s", **branches),
        node("Add", ["s", "bias"], "y"),
    ]
    weights = {"conv.weight": held["0.weight"], "conv.bias": held["0.bias"], "fc.weight": held["3.weight"]}
    others = {"fc.bias": held["3.bias"], "bias": held["5.bias"], "limit": np.array(1.0, np.float32)}
    if constants:
        made = [node("Constant", [], name, value=numpy_helper.from_array(array)) for name, array in weights.items()]
        return model([*made, *nodes], {"x": [batch, 1, 8, 8]}, others, opset=opset)
    return model(nodes, {"x": [batch, 1, 8, 8]}, weights | others, opset=opset)


@pytest.fixture(scope="module")
def digits() -> Data:
    return few(digits_data((1, 8, 8)))


def test_what_cannot_be_trained_says_so_before_anything_is_computed(digits: Data, tmp_path: Path) -> None:
    content = digits_graph().SerializeToString()
    for index, step in enumerate((Finetune(), Prune(sparsity=0.5, training=Training()))):
        with pytest.raises(Unsupported, match=r"cannot be trained.*control flow \(If\)") as caught:
            done(job(tmp_path / str(index), content, digits, step))
        assert caught.value.pointer == "/steps/0"


@pytest.mark.parametrize("opset", [11, pytest.param(17, marks=pytest.mark.slow)])
def test_a_graph_with_branches_is_pruned_and_quantized(opset: int, digits: Data, tmp_path: Path) -> None:
    content = digits_graph(opset, constants=opset == 11).SerializeToString()
    request = job(tmp_path / "job", content, digits, Prune(sparsity=0.5), Quantize())
    report = done(request)
    native, int8 = artifact(report, "native"), artifact(report, "onnx")
    assert metric(report.uploaded) > 0.8
    for one in (native, int8):
        assert metric(one) == pytest.approx(recomputed(request.output / one.name, digits, "x"), abs=1e-9)
        assert metric(one) > metric(report.uploaded) - 0.1
        assert one.measurement.macs == report.uploaded.macs == 8 * 6 * 6 * 9 + 288 * 32 + 32 * 10
    sparsity = {layer.name: layer.sparsity for layer in native.measurement.layers}
    assert set(sparsity) == {"conv.weight", "fc.weight", "then_branch_w", "else_branch_w"}
    assert all(share > 0.05 for share in sparsity.values())
    bits = {layer.name: layer.bits for layer in int8.measurement.layers}
    assert bits == {"conv.weight": 8, "fc.weight": 8, "then_branch_w": 32, "else_branch_w": 32}
    assert len(onnx.load(request.output / "native.onnx").graph.node) == len(onnx.load_from_string(content).graph.node)
    (step,) = (one for one in report.steps if one.technique == "quantize")
    assert (step.details["layers_int8"], step.details["layers_float"]) == (2, 2)


def test_dynamic_int8_needs_no_data(digits: Data, tmp_path: Path) -> None:
    content = digits_graph().SerializeToString()
    report = done(job(tmp_path / "job", content, None, Quantize(method="dynamic"), export=("onnx",)))
    assert {layer.name: layer.bits for layer in report.artifacts[0].measurement.layers}["fc.weight"] == 8


def test_a_fixed_batch_stays_in_what_is_delivered(digits: Data, tmp_path: Path) -> None:
    content = digits_graph(batch=1).SerializeToString()
    request = job(tmp_path / "job", content, digits, Prune(sparsity=0.5), Quantize())
    report = done(request)
    assert metric(report.uploaded) > 0.8
    for name in ("native.onnx", "model.onnx"):
        assert onnx.load(request.output / name).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_an_archive_with_data_beside_the_graph(lenet_upload: bytes, mnist: Data, tmp_path: Path) -> None:
    onnx.save_model(
        onnx.load_from_string(lenet_upload),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    files = {name: (tmp_path / name).read_bytes() for name in ("m.onnx", "m.data")}
    content = zipped(files)
    request = job(tmp_path / "job", content, few(mnist), Prune(sparsity=0.5), export=("native",))
    report = done(request)
    assert report.uploaded.size_bytes == len(content)
    assert report.uploaded.runtime == "onnxruntime"
    native = onnx.load(request.output / "native.onnx")
    assert {tensor.data_location for tensor in native.graph.initializer} == {TensorProto.DEFAULT}
    assert metric(artifact(report, "native")) > metric(report.uploaded) - 0.1
