from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from app.contract.errors import ExportFailed
from app.contract.facts import TensorFacts
from tests.worker.conftest import OnnxExport
from tests.worker.helpers import tiny_model
from tests.worker.loading.onnx_files import model as graph
from tests.worker.loading.onnx_files import noise, run
from tests.worker.nets import model_of
from worker.export import onnx as exporter
from worker.export.onnx import OPSET, export_onnx
from worker.loading import load_model
from worker.model import Model

LENET_PARAMETERS = 61_706


def shapes(values: list[onnx.ValueInfoProto]) -> list[tuple[str, list[str | int]]]:
    return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


def agree(model: Model, path: Path, *inputs: Tensor) -> None:
    """The module and the file give the same logits."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [facts.name for facts in model.facts.inputs]
    (logits,) = session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model.module(*inputs).numpy(), atol=1e-5)


def test_lenet_keeps_names_batch_and_outputs(trained_lenet: Model, lenet_float: Path) -> None:
    proto = onnx.load(lenet_float)
    onnx.checker.check_model(proto, full_check=True)
    assert shapes(proto.graph.input) == [("input", ["batch", 1, 28, 28])]
    assert shapes(proto.graph.output) == [("logits", ["batch", 10])]
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    for batch in (1, 2, 7):
        agree(trained_lenet, lenet_float, torch.randn(batch, 1, 28, 28))


def test_one_file_with_its_weights_and_nothing_about_the_machine(lenet_float: Path, lenet_int8: Path) -> None:
    assert list(lenet_float.parent.glob("*.data")) == []
    for path in (lenet_float, lenet_int8):
        content = path.read_bytes()
        for leak in (b".py", b"pkg.torch", b"stack_trace", b"site-packages", str(Path.cwd()).encode(), b"/tmp"):
            assert leak not in content, (path.name, leak)
    assert lenet_float.stat().st_size < 4 * LENET_PARAMETERS + 4096
    # A byte a weight, four a bias, and what says how to quantize.
    assert lenet_int8.stat().st_size < LENET_PARAMETERS + 12_000


def test_free_lengths_and_transposed_weights_of_bert(zoo: Callable[[str], OnnxExport]) -> None:
    exported = zoo("bert")
    proto = onnx.load(exported.path)
    assert shapes(proto.graph.input) == [
        ("input_ids", ["batch", "input_ids_1"]),
        ("attention_mask", ["batch", "input_ids_1"]),
    ]
    for batch, length in ((1, 5), (3, 64)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[:, length // 2 :] = 0
        agree(exported.model, exported.path, torch.randint(0, 100, (batch, length)), mask)
    stored = {t.name for t in proto.graph.initializer}
    matrices = {n for n, p in exported.model.module.named_parameters() if p.ndim == 2 and "embeddings" not in n}
    assert matrices <= stored


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_keep_length_and_names(name: str, zoo: Callable[[str], OnnxExport]) -> None:
    exported = zoo(name)
    for batch, length in ((1, 3), (4, 40)):
        agree(exported.model, exported.path, torch.randint(0, 50, (batch, length)))
    stored = {t.name for t in onnx.load(exported.path).graph.initializer}
    assert {"emb.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "fc.weight"} <= stored


def test_batch_norm_is_folded_into_its_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    module.train()(torch.randn(16, 3, 8, 8) * 3 + 1)
    model = tiny_model(module.eval(), shape=(3, 8, 8), classes=4)
    path = export_onnx(module, model, tmp_path / "model.onnx")
    proto = onnx.load(path)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert {"0.weight", "4.weight"} <= {t.name for t in proto.graph.initializer}
    agree(model, path, torch.randn(5, 3, 8, 8))


class FixesLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 32).sum(1, keepdim=True) if x.shape[1] == 32 else x


def test_a_dimension_that_the_model_fixes_is_refused(tmp_path: Path) -> None:
    model = model_of(FixesLength(), TensorFacts(name="x", shape=(None,), dtype="float32"), classes=1)
    with pytest.raises(ExportFailed, match=r"could not export the model to ONNX.*conflicts"):
        export_onnx(model.module, model, tmp_path / "model.onnx")


def test_weights_beyond_a_file_are_refused(
    trained_lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "MAX_BYTES", 1000)
    with pytest.raises(ExportFailed, match="Export native instead"):
        export_onnx(trained_lenet.module, trained_lenet, tmp_path / "model.onnx")


def uploaded(folder: Path) -> Model:
    """A network of a convolution that came as ONNX and ends in probabilities."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Softmax", ["f"], ["chances"]),
    ]
    proto = graph(nodes, {"x": ["n", 3, 8, 8]}, {"kernel": noise(4, 3, 3, 3)}, outputs=["chances"], opset=13)
    path = folder / "upload.onnx"
    path.write_bytes(proto.SerializeToString())
    return load_model(path, path.name, {"task": "image-classification"}, folder)


def test_an_uploaded_graph_keeps_its_names_and_its_end(tmp_path: Path) -> None:
    model = uploaded(tmp_path)
    proto = onnx.load(export_onnx(model.module, model, tmp_path / "model.onnx"))
    assert shapes(proto.graph.input) == [("x", ["batch", 3, 8, 8])]
    assert shapes(proto.graph.output) == [("chances", ["batch", 4])]
    assert proto.producer_name == "pytorch"
    assert {"kernel.weight"} == {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 4}
    inputs = noise(3, 3, 8, 8)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(inputs)).softmax(-1).numpy()
    np.testing.assert_allclose(run(proto, {"x": inputs}), expected, atol=1e-6)


def test_an_uploaded_graph_that_torch_cannot_export_is_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("torch.onnx.export", fail)
    model = uploaded(tmp_path)
    with torch.no_grad():
        model.module.get_parameter("kernel.weight").mul_(2)
    proto = onnx.load(export_onnx(model.module, model, tmp_path / "model.onnx"))
    assert [node.op_type for node in proto.graph.node] == ["Conv", "GlobalAveragePool", "Flatten", "Softmax"]
    (kernel,) = proto.graph.initializer
    assert kernel.name == "kernel.weight"
    np.testing.assert_array_equal(numpy_helper.to_array(kernel), noise(4, 3, 3, 3) * 2)
    with pytest.raises(ExportFailed, match="torch could not export"):
        export_onnx(nn.Linear(64, 10), tiny_model(nn.Linear(64, 10)), tmp_path / "other.onnx")
