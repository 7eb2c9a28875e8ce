"""Programs of integers beside the ONNX graphs that they are made of, on small networks."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from app.contract.errors import ArtifactUnverified, ExportFailed
from app.contract.spec import Calibration, Quantize
from benchmarks.resnet import block
from tests.worker.helpers import tiny_model
from worker.data.batch import Batch
from worker.evaluation.layers import graph_layers, sqnr_db
from worker.evaluation.program import ProgramFile, float_twins, integer_weights
from worker.export.onnx import export_onnx
from worker.export.program import export_program, input_names, open_program, save_program
from worker.model import Model
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.program_int8 import IntegerModule, integer_module
from worker.techniques.quantization.stored import stored_weights

# As docs/http.md says: nothing but torch.
LOAD = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
program = torch.export.load(sys.argv[1]).module()
inputs, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(program(inputs), wanted), (program(inputs) - wanted).abs().max()
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"worker", "app", "torchao", "onnx", "transformers"}))
"""


def plain(**changes: object) -> Quantize:
    """Quick: what is asked here does not depend on how steps and ranges were found."""
    quick = {"rounding": "nearest", "smooth": False, "calibration": Calibration(method="minmax")}
    return Quantize.model_validate(quick | changes)


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *block(8, 8, 1),
        *block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net


class Upwards(nn.Sequential):
    """Transposed, grouped and one-dimensional convolutions."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(6, 6, 3, padding=1, groups=3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


class Noise:
    """The same batches of noise each time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = [Batch((torch.randn(16, *shape, generator=generator),), None) for _ in range(2)]

    def samples(self) -> Samples:
        return Samples(lambda: self.batches, ["input"], len(self.batches))

    @property
    def inputs(self) -> torch.Tensor:
        return self.batches[0].inputs[0]


Made = tuple[Model, Int8Graph, IntegerModule, Noise]


def made(
    module: nn.Module, shape: tuple[int, ...], folder: Path, step: Quantize, float_layers: tuple[str, ...]
) -> Made:
    model, noise = tiny_model(module.eval(), shape=shape), Noise(shape)
    reference = export_onnx(module, model, folder / "float.onnx")
    graph = quantize_file(reference, folder / "int8.onnx", step, noise.samples(), float_layers)
    return model, graph, integer_module(onnx.load(graph.path)), noise


def run_graph(path: Path, inputs: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"input": inputs.numpy()})[0]
    return found


@pytest.mark.parametrize(
    ("network", "shape", "changes"),
    [
        (residual, (3, 12, 12), {}),
        (residual, (3, 12, 12), {"per_channel": False}),
        (residual, (3, 12, 12), {"activations": "int8"}),
        (residual, (3, 12, 12), {"rounding": "adaptive", "smooth": True, "exclude": ("0",)}),
        (Upwards, (4, 8), {}),
    ],
)
def test_a_program_holds_the_integers_of_the_graph_and_gives_what_it_gives(
    network: Callable[[], nn.Module], shape: tuple[int, ...], changes: Mapping[str, object], tmp_path: Path
) -> None:
    step = plain(**changes)
    float_layers = ("0",) if step.exclude else ()
    model, graph, found, noise = made(network(), shape, tmp_path, step, float_layers)
    path = save_program(found.module, model, tmp_path / "program.pt2")
    file = ProgramFile(path, model.facts, 1, graph, found.sources)
    exact = run_graph(graph.reference, noise.inputs)
    outputs, reference = file.outputs((noise.inputs,)), run_graph(graph.path, noise.inputs)
    assert sqnr_db(reference, outputs) > 25  # 8 bits leave about 40; a value between two codes can go either way
    assert sqnr_db(exact, outputs) > sqnr_db(exact, reference) - 3
    one = file.outputs((noise.inputs[:1],))
    np.testing.assert_allclose(one, outputs[:1], atol=0.05 * float(np.abs(outputs).max()))
    _check_weights(file, graph, step)
    _check_fresh(path, noise.inputs[:8], tmp_path)


def _check_weights(file: ProgramFile, graph: Int8Graph, step: Quantize) -> None:
    proto = onnx.load(graph.path)
    stored = {weight.name: weight for weight in stored_weights(proto) if weight.scale is not None}
    held = {weight.name: weight for weight in integer_weights(file.program)}
    assert set(held) == set(stored)  # of every layer that was promised, and under the names of the state dict
    for name, weight in held.items():
        assert weight.values.dtype == np.int8
        same = weight.values if weight.shape == stored[name].shape else weight.values.T
        np.testing.assert_array_equal(same, stored[name].values)
        if step.activations != "int8":
            assert np.abs(weight.values.astype(int)).max() <= 64  # decision 8
    assert file.twins() == []
    by_name = {layer.name: layer for layer in graph_layers(proto, onnx.load(graph.floats))}
    for layer in file.layers():
        if layer.name in held:
            assert (layer.bits, layer.sparsity) == (8, by_name[layer.name].sparsity)
            assert layer.sqnr_db == pytest.approx(by_name[layer.name].sqnr_db)
    assert not any("running_mean" in name for name in file.program.state_dict)  # folded


def _check_fresh(path: Path, inputs: torch.Tensor, folder: Path) -> None:
    with torch.no_grad():
        wanted = open_program(path).module()(inputs)
    torch.save((inputs, wanted), folder / "case.pt")
    command = [sys.executable, "-c", LOAD, str(path), str(folder / "case.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_pruned_weights_stay_zero_and_bytes_are_a_quarter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    masks = {}
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                masks[name] = torch.rand_like(weight) > 0.5
                weight *= masks[name]
    model, graph, found, _ = made(module, (64,), tmp_path, plain(), ())
    path = save_program(found.module, model, tmp_path / "program.pt2")
    for weight in integer_weights(open_program(path)):
        assert not weight.values[~masks[weight.name].numpy()].any()
    with zipfile.ZipFile(path) as archive:
        tensors = sum(one.file_size for one in archive.infolist() if "/data/weights/weight_" in one.filename)
    weights, outputs = 64 * 256 + 256 * 256 + 256 * 10, 256 + 256 + 10
    assert tensors == weights + (4 + 4 + 8) * outputs  # codes; steps, biases, zero points
    file = ProgramFile(path, model.facts, 1, graph, found.sources)
    total, nonzero = file.parameters()
    assert total == weights + outputs
    assert nonzero <= int(sum(mask.sum() for mask in masks.values())) + outputs


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(96, 96)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(torch.relu(self.layer(given)))
        return found


def test_a_weight_that_layers_have_in_common_is_stored_once(tmp_path: Path) -> None:
    model, graph, found, _ = made(Twice(), (96,), tmp_path, plain(), ())
    path = save_program(found.module, model, tmp_path / "program.pt2")
    with zipfile.ZipFile(path) as archive:
        tensors = sum(one.file_size for one in archive.infolist() if "/data/weights/weight_" in one.filename)
    assert 96 * 96 <= tensors < 1.5 * 96 * 96
    file = ProgramFile(path, model.facts, 1, graph, found.sources)
    assert file.parameters()[0] <= 96 * 96 + 2 * 96
    assert [layer.name for layer in file.layers()] == ["layer.weight"]


def test_sums_of_convolutions_are_not_rounded_before(tmp_path: Path) -> None:
    _, graph, found, _ = made(residual(), (3, 12, 12), tmp_path, plain(), ())
    functions = [getattr(node.target, "__name__", "") for node in found.module.graph.nodes]
    pairs = [node.op_type for node in onnx.load(graph.path).graph.node]
    assert functions.count("quantize") == pairs.count("QuantizeLinear") - 3  # two sums, and the output


def test_constants_that_no_layer_holds(tmp_path: Path) -> None:
    """A batch of matrices, which a MatMul takes as they are."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-64, 65, (2, 8, 4)).astype(np.int8)
    held = {
        "w_quantized": codes,
        "w_scale": np.array(0.01, np.float32),
        "w_zero_point": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"], ["w_floats"]),
        helper.make_node("MatMul", ["input", "w_floats"], ["output"]),
    ]
    shapes = {
        name: helper.make_tensor_value_info(name, 1, ["n", 2, 5, end]) for name, end in (("input", 8), ("output", 4))
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", [shapes["input"]], [shapes["output"]], tensors)
    found = integer_module(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    inputs = torch.randn(3, 2, 5, 8)
    wanted = inputs @ torch.from_numpy(codes.astype(np.float32) * np.float32(0.01))
    torch.testing.assert_close(found.module(inputs), wanted)
    assert [source.weight for source in found.sources.values()] == ["w"]


def test_rows_that_are_always_the_same_are_a_constant() -> None:
    """As those of positions where the length is fixed."""
    codes = np.random.default_rng(0).integers(-64, 65, (32, 8)).astype(np.int8)
    held = {
        "w_quantized": codes,
        "w_scale": np.array(0.01, np.float32),
        "w_zero_point": np.array(0, np.int8),
        "rows": np.arange(6),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"], ["w_floats"]),
        helper.make_node("Gather", ["w_floats", "rows"], ["positions"]),
        helper.make_node("Add", ["input", "positions"], ["output"]),
    ]
    given, output = (helper.make_tensor_value_info(name, 1, ["n", 6, 8]) for name in ("input", "output"))
    tensors = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", [given], [output], tensors)
    found = integer_module(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    inputs = torch.randn(3, 6, 8)
    wanted = inputs + torch.from_numpy(codes[:6].astype(np.float32) * np.float32(0.01))
    torch.testing.assert_close(found.module(inputs), wanted)
    assert found.sources == {}


def test_what_has_no_form_in_torch_is_said(tmp_path: Path) -> None:
    _, graph, _, _ = made(nn.Sequential(nn.Linear(8, 4)), (8,), tmp_path, plain(), ())
    proto = onnx.load(graph.path)
    proto.graph.node.append(helper.make_node("Det", [proto.graph.output[0].name], ["odd"]))
    proto.graph.output[0].name = "odd"
    with pytest.raises(ExportFailed, match=r"'?Det.*Export onnx instead") as caught:
        integer_module(proto)
    assert caught.value.pointer == "/export"


def test_a_weight_that_is_there_as_floats_is_found(tmp_path: Path) -> None:
    model, graph, found, _ = made(nn.Sequential(nn.Linear(8, 4)), (8,), tmp_path, plain(), ())
    path = export_program(model.module, model, tmp_path / "float.pt2")
    with pytest.raises(ArtifactUnverified, match=r"0\.weight as int8"):
        ProgramFile(path, model.facts, 1, graph, found.sources)
    found.module.register_buffer("again", next(iter(integer_weights_of(found, model, tmp_path))))
    twice = nn.Sequential(found.module)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = twice

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.inner(given) + given @ found.module.again.T  # type: ignore[operator,union-attr]

    both = save_program(Both(), model, tmp_path / "both.pt2")
    program = open_program(both)
    assert len(float_twins(program, integer_weights(program))) == 1


def integer_weights_of(found: IntegerModule, model: Model, folder: Path) -> list[torch.Tensor]:
    path = save_program(found.module, model, folder / "once.pt2")
    return [torch.from_numpy(weight.dequantized()) for weight in integer_weights(open_program(path))]


def test_names_of_inputs_become_names_of_arguments() -> None:
    assert input_names(["x", "x:0", "x_0", "class", "1st"]) == ["x", "x_0", "input_2", "input_3", "input_4"]
