"""ONNX uploads as models: inputs, batches, logits, types, and which way a file goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL.Image import fromarray

from app.contract.errors import DatasetMismatch, ModelRejected
from tests.worker.loading.files import zipped
from tests.worker.loading.onnx_files import model, noise, run
from tests.worker.loading.test_onnx_direct import branching
from worker.data.base import RawBatch
from worker.inspect import examine, inspect_upload
from worker.loading import load_model
from worker.loading.onnx import NATIVE
from worker.loading.onnx_direct import DirectModule
from worker.model import Model

X = noise(2, 4)
TASK = "image-classification"


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def linear(**changes: Any) -> ModelProto:
    return model([node("Gemm", ["x", "w", "b"])], {"x": X}, {"w": noise(4, 3), "b": noise(3)}, **changes)


def upload(content: ModelProto | bytes, folder: Path, **spec: Any) -> Model:
    path = folder / "upload.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return load_model(path, path.name, {"task": TASK} | spec, scratch)


def refused(proto: ModelProto, folder: Path, words: str, **spec: Any) -> ModelRejected:
    with pytest.raises(ModelRejected, match=words) as caught:
        upload(proto, folder, **spec)
    return caught.value


def saved(loaded: Model, folder: Path) -> ModelProto:
    path = loaded.save(loaded.module, folder)
    assert path.name == loaded.facts.native_file == NATIVE
    return onnx.load(path)


def test_a_file_says_what_it_takes(tmp_path: Path) -> None:
    loaded = upload(linear(), tmp_path, labels=["a", "b", "c"])
    facts = loaded.facts
    assert (facts.format, facts.task, facts.classes, facts.labels) == ("onnx", TASK, 3, ("a", "b", "c"))
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in facts.inputs] == [("x", (4,), "float32")]
    assert (facts.parameters, facts.trainable, facts.untrainable_reason) == (15, True, None)
    assert (facts.output_kind, facts.single_samples, loaded.output_name) == ("logits", False, "y")
    assert [(layer.name, layer.type) for layer in facts.layers] == [("w", "Linear")]
    assert saved(loaded, tmp_path) == linear()


def test_an_inspection_says_which_techniques_apply(tmp_path: Path) -> None:
    facts = examine(upload(linear(), tmp_path))
    # One layer has no units, and no blocks or connections of its own.
    wide = {("prune", "structured"), ("resize", "drop_layers"), ("resize", "connections"), ("resize", "width")}
    assert {(one.technique, one.method) for one in facts.techniques if not one.applies} == wide
    assert facts.cost is not None
    assert facts.cost.macs == 12
    facts = examine(upload(branching(), tmp_path))
    applies = {(one.technique, one.method): (one.applies, one.reason or "") for one in facts.techniques}
    assert applies["prune", None][0]
    assert applies["quantize", "static"][0]
    assert not applies["finetune", None][0]
    assert "control flow (If)" in applies["finetune", None][1]
    assert facts.cost is not None
    assert facts.cost.macs == 12 + 6  # the shared product, and one of the branches


def test_the_spec_has_to_say_the_task_and_nothing_of_layers(tmp_path: Path) -> None:
    assert refused(linear(), tmp_path, "give spec.task", task=None).pointer == "/task"
    layers = {"layers": [{"type": "Linear", "in_features": 4, "out_features": 3}]}
    error = refused(linear(), tmp_path, "says its layers itself", architecture=layers, input={"shape": [4]})
    assert error.pointer == "/architecture"
    assert refused(linear(), tmp_path, "3 outputs .* 2 labels", labels=["a", "b"]).pointer == "/labels"
    refused(linear(), tmp_path, "needs its tokenizer", task="masked-lm")
    refused(linear(), tmp_path, r"token-classification model gives \[2, steps, classes\]", task="token-classification")


# --- inputs and batches -------------------------------------------------------------------------------------------


def two_inputs() -> ModelProto:
    ids = np.array([[0], [1]])
    nodes = [node("Gather", ["table", "ids"], "e"), node("ReduceMean", ["e"], "m", axes=[1], keepdims=0)]
    nodes += [node("Add", ["m", "x"], "s"), node("MatMul", ["s", "w"])]
    held = {"table": noise(7, 4), "w": noise(4, 3)}
    return model(nodes, {"x": X, "ids": ids}, held, opset=13)


def test_several_inputs_are_fed_by_name(tmp_path: Path) -> None:
    loaded = upload(two_inputs(), tmp_path)
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in loaded.facts.inputs] == [
        ("x", (4,), "float32"),
        ("ids", (1,), "int64"),
    ]
    arrays = {"ids": torch.tensor([[3], [6]], dtype=torch.int32), "x": torch.from_numpy(X).double()}
    inputs = loaded.encode(RawBatch(arrays, None))
    assert [tensor.dtype for tensor in inputs] == [torch.float32, torch.int64]
    expected = run(two_inputs(), {"x": X, "ids": np.array([[3], [6]])})
    with torch.no_grad():
        np.testing.assert_allclose(loaded.module(*inputs).numpy(), expected, atol=1e-5)


def test_ids_beyond_the_table_are_refused(tmp_path: Path) -> None:
    loaded = upload(two_inputs(), tmp_path)
    with pytest.raises(DatasetMismatch, match="ids from 3 to 7; the model's embedding knows 0 to 6"):
        loaded.encode(RawBatch({"ids": torch.tensor([[3], [7]]), "x": torch.from_numpy(X)}, None))


def convolution(*size: int | str, batch: int | str = "batch") -> ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("GlobalAveragePool", ["c"], "g"),
        node("Flatten", ["g"]),
    ]
    return model(nodes, {"x": [batch, 3, *size]}, {"w": noise(5, 3, 3, 3)})


def test_pictures_are_taken_where_the_input_is_one(tmp_path: Path) -> None:
    loaded = upload(convolution(8, 8), tmp_path)
    assert loaded.facts.accepts == ("arrays", "images")
    picture = fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    (pixels,) = loaded.encode(RawBatch([picture], None))
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy() * 255, np.asarray(picture), atol=1e-4)
    assert upload(linear(), tmp_path).facts.accepts == ("arrays",)


def test_open_sizes_stay_open(tmp_path: Path) -> None:
    loaded = upload(convolution("height", "width"), tmp_path)
    assert loaded.facts.inputs[0].shape == (3, None, None)
    for height, width in ((9, 12), (40, 5)):
        inputs = noise(2, 3, height, width)
        with torch.no_grad():
            got = loaded.module(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(got, run(convolution("height", "width"), {"x": inputs}), atol=1e-5)


def test_a_size_that_the_network_needs_is_found(tmp_path: Path) -> None:
    """Six halvings of the input, which 32 points do not survive."""
    nodes = []
    for level in range(6):
        source, target = (f"h{level}" if level else "x"), f"h{level + 1}"
        nodes.append(node("MaxPool", [source], target, kernel_shape=[2, 2], strides=[2, 2]))
    nodes += [node("GlobalAveragePool", ["h6"], "g"), node("Flatten", ["g"])]
    loaded = upload(model(nodes, {"x": ["batch", 3, "h", "w"]}), tmp_path)
    assert loaded.example_length >= 64
    assert loaded.facts.trainable


def fixed(rows: int = 1) -> ModelProto:
    nodes = [node("Reshape", ["x", "s"], "f"), node("MatMul", ["f", "w"])]
    return model(nodes, {"x": [rows, 2, 2]}, {"s": np.array([rows, 4], np.int64), "w": noise(4, 3)})


def test_a_fixed_batch_of_one_is_opened_for_training(tmp_path: Path) -> None:
    loaded = upload(fixed(), tmp_path)
    assert (loaded.facts.single_samples, loaded.facts.trainable) == (True, True)
    inputs = noise(5, 2, 2)
    expected = np.concatenate([run(fixed(), {"x": inputs[i : i + 1]}) for i in range(5)])
    with torch.no_grad():
        np.testing.assert_allclose(loaded.module(torch.from_numpy(inputs)).numpy(), expected, atol=1e-5)
    assert saved(loaded, tmp_path) == fixed()


def test_a_batch_that_is_open_in_name_alone_counts_as_fixed(tmp_path: Path) -> None:
    proto = fixed()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    loaded = upload(onnx.shape_inference.infer_shapes(proto), tmp_path)
    assert (loaded.facts.single_samples, loaded.facts.trainable) == (True, True)


def test_what_has_no_batch_is_refused(tmp_path: Path) -> None:
    refused(fixed(8), tmp_path, r"first dimension of 8.*dynamic_axes")
    state = model([node("Add", ["x", "state"])], {"x": ["batch", 4], "state": [2, "batch", 4]})
    refused(state, tmp_path, "'state' has a first dimension of 2.*States")
    rate = model([node("Mul", ["x", "rate"])], {"x": ["batch", 4], "rate": []})
    refused(rate, tmp_path, "'rate' has no batch dimension")
    mixing = [node("ReduceMean", ["x"], "m", axes=[0]), node("Sub", ["x", "m"])]
    refused(model(mixing, {"x": X}, opset=13), tmp_path, "influence each other")


def test_weights_listed_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    """As files before IR version 4 have it."""
    proto = linear(opset=9)
    proto.ir_version = 3
    proto.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in proto.graph.initializer
    )
    loaded = upload(proto, tmp_path)
    assert [tensor.name for tensor in loaded.facts.inputs] == ["x"]
    assert loaded.facts.trainable


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_network_that_ends_in_probabilities_is_trained_on_its_logits(tmp_path: Path) -> None:
    proto = model([node("Gemm", ["x", "w"], "z"), node("Softmax", ["z"])], {"x": X}, {"w": noise(4, 3)})
    loaded = upload(proto, tmp_path)
    assert (loaded.facts.output_kind, loaded.facts.classes) == ("softmax", 3)
    with torch.no_grad():
        logits = loaded.module(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(logits, X @ noise(4, 3), atol=1e-5)
    assert saved(loaded, tmp_path) == proto


def test_one_probability_is_a_classifier_of_two(tmp_path: Path) -> None:
    proto = model([node("Gemm", ["x", "w"], "z"), node("Sigmoid", ["z"])], {"x": X}, {"w": noise(4, 1)})
    loaded = upload(proto, tmp_path, labels=["no", "yes"])
    assert (loaded.facts.output_kind, loaded.facts.classes, loaded.facts.trainable) == ("binary", 2, True)


def test_class_numbers_are_no_output_to_learn_from(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w"], "z"), node("ArgMax", ["z"], axis=1, keepdims=0), node("Softmax", ["z"], "p")]
    proto = model(nodes, {"x": X}, {"w": noise(4, 3)}, outputs=["y", "p"])
    refused(proto, tmp_path, "'y' holds no floating-point numbers.*Put one of 'p' before it")


def test_outputs_of_any_shape_are_values(tmp_path: Path) -> None:
    proto = model(
        [node("Conv", ["x", "w"], "c"), node("Sigmoid", ["c"])], {"x": noise(2, 3, 6, 6)}, {"w": noise(1, 3, 3, 3)}
    )
    loaded = upload(proto, tmp_path, task="regression")
    assert (loaded.facts.output_kind, loaded.facts.trainable) == ("logits", True)
    with torch.no_grad():
        assert loaded.module(torch.randn(2, 3, 6, 6)).shape == (2, 1, 4, 4)


# --- numbers ------------------------------------------------------------------------------------------------------


def test_float16_is_computed_in_float32_and_saved_as_it_came(tmp_path: Path) -> None:
    half = {"w": noise(4, 3).astype(np.float16), "b": noise(3).astype(np.float16)}
    proto = model([node("Gemm", ["x", "w", "b"])], {"x": X.astype(np.float16)}, half)
    loaded = upload(proto, tmp_path)
    assert loaded.facts.inputs[0].dtype == "float32"
    assert {tensor.dtype for tensor in loaded.module.parameters()} == {torch.float32}
    assert set(loaded.stored.values()) == {torch.float16}
    assert set(loaded.stored) == {"w.weight", "w.bias"}
    with torch.no_grad():
        next(loaded.module.parameters()).add_(1e-5)
    loaded.round_as_stored(loaded.module)
    assert {tensor.data_type for tensor in saved(loaded, tmp_path).graph.initializer} == {TensorProto.FLOAT16}


def test_weights_that_are_no_numbers_are_refused_and_infinite_masks_are_not(tmp_path: Path) -> None:
    proto = linear()
    weight = noise(4, 3)
    weight[1, 1] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    refused(proto, tmp_path, "'w' holds 1 NaN")
    mask = np.where(np.eye(3), 0, -np.inf).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], "s"), node("Where", ["keep", "s", "mask"], "m"), node("Softmax", ["m"], "p")]
    nodes += [node("ReduceMean", ["p"], axes=[1], keepdims=0)]
    held = {"w": noise(4, 3), "keep": np.eye(3, dtype=bool), "mask": mask}
    assert upload(model(nodes, {"x": noise(2, 3, 4)}, held, opset=13), tmp_path).facts.trainable


def in_bfloat16(*nodes: onnx.NodeProto) -> ModelProto:
    """The linear network with its weight in bfloat16."""
    proto = linear()
    values = torch.from_numpy(noise(4, 3)).bfloat16().float().flatten().tolist()
    proto.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.BFLOAT16, [4, 3], values))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def test_bfloat16_is_refused_where_it_is_computed_with(tmp_path: Path) -> None:
    short = [node("Cast", [name], f"{name}16", to=TensorProto.BFLOAT16) for name in ("x", "b")]
    product = node("Gemm", ["x16", "w", "b16"], "m")
    refused(in_bfloat16(*short, product, node("Cast", ["m"], to=TensorProto.FLOAT)), tmp_path, "'w' is bfloat16")


def test_bfloat16_behind_a_cast_is_a_way_to_store_weights(tmp_path: Path) -> None:
    nodes = node("Cast", ["w"], "f", to=TensorProto.FLOAT), node("Gemm", ["x", "f", "b"])
    loaded = upload(in_bfloat16(*nodes), tmp_path)
    assert loaded.facts.trainable
    (weight,) = (value for value in loaded.module.state_dict().values() if value.ndim == 2)
    torch.testing.assert_close(weight.T, torch.from_numpy(noise(4, 3)).bfloat16().float(), rtol=0, atol=0)


def test_a_float16_graph_that_is_not_trained_is_not_quantized(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "h"), node("Reshape", ["h", "square"], "s"), node("Cast", ["s"], "f", to=1)]
    nodes += [node("Det", ["f"], "d"), node("Unsqueeze", ["d", "last"])]
    held = {"w": noise(4, 4).astype(np.float16), "square": np.array([-1, 2, 2], np.int64), "last": np.array([1])}
    proto = model(nodes, {"x": X.astype(np.float16)}, held, opset=13)
    applies = {
        (one.technique, one.method): one for one in examine(upload(proto, tmp_path, task="regression")).techniques
    }
    assert applies["prune", None].applies
    for method in ("static", "dynamic"):
        assert not applies["quantize", method].applies
        assert "float16" in (applies["quantize", method].reason or "")


# --- the direct way -----------------------------------------------------------------------------------------------


def unsupported() -> ModelProto:
    """A product, and an operator that has no form in torch here."""
    nodes = [
        node("MatMul", ["x", "w"], "h"),
        node("Reshape", ["h", "square"], "s"),
        helper.make_node("Det", ["s"], ["d"], name="volume"),
        node("Unsqueeze", ["d", "last"], "u"),
        node("Add", ["h", "u"]),
    ]
    held = {"w": noise(4, 4), "square": np.array([-1, 2, 2], np.int64), "last": np.array([1], np.int64)}
    return model(nodes, {"x": X}, held, opset=13)


@pytest.mark.parametrize(
    ("proto", "parameters", "classes", "words"),
    [
        (branching(), 24, 2, r"control flow \(If\)"),
        (unsupported(), 16, 4, r"^Operator Det \('volume'\) has no trainable form here\.$"),
    ],
)
def test_what_has_no_form_in_torch_runs_as_it_is(
    proto: ModelProto, parameters: int, classes: int, words: str, tmp_path: Path
) -> None:
    loaded = upload(proto, tmp_path)
    facts = loaded.facts
    assert isinstance(loaded.module, DirectModule)
    assert not facts.trainable
    assert facts.untrainable_reason is not None
    assert re.search(words, facts.untrainable_reason)
    assert (facts.parameters, facts.classes) == (parameters, classes)
    assert saved(loaded, tmp_path) == proto


def test_a_module_that_disagrees_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b + 1e-3

    monkeypatch.setattr("worker.loading.onnx_ops.linear.add", wrong)
    proto = model([node("Add", ["x", "w"])], {"x": X}, {"w": noise(4)})
    facts = upload(proto, tmp_path).facts
    assert not facts.trainable
    assert facts.untrainable_reason == "As a torch module its outputs differ from ONNX Runtime's by 0.001."


def test_what_onnx_runtime_cannot_run_is_refused(tmp_path: Path) -> None:
    proto = model([node("Reshape", ["x", "s"])], {"x": X}, {"s": np.array([7, 7], np.int64)})
    with pytest.raises(ModelRejected):
        upload(proto, tmp_path)


def test_a_folder_with_a_graph_and_no_weights_of_transformers_is_onnx(tmp_path: Path) -> None:
    content = zipped({"export/model.onnx": linear().SerializeToString(), "export/config.json": b"{}"})
    facts = inspect_upload("model", _file(tmp_path, content), "m.zip", {"task": TASK}, tmp_path)
    assert facts.format == "onnx"  # type: ignore[union-attr]


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "m.zip"
    path.write_bytes(content)
    return path
