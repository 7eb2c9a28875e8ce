"""Jobs that deliver a program of torch: loaded again by torch alone, as anybody would."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from app.contract.errors import ExportFailed, OrderRefused, Unsupported
from app.contract.facts import DatasetFacts, SplitFacts, TensorFacts
from app.contract.pruning import Prune
from app.contract.report import ArtifactReport, Report
from app.contract.spec import ExportFormat, Quantize, Step
from app.contract.weight_only import WeightOnly
from tests.acceptance.test_onnx import perceptron
from tests.worker.helpers import MemorySplit, context_for, digits_data, part_of
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.nets import Recurrent, text_model
from tests.worker.test_run_compressed_tensors import bert
from tests.worker.test_run_onnx import digits_graph
from worker.constraints import baked
from worker.data.base import Data, RawBatch
from worker.evaluation import compare
from worker.evaluation.layers import sqnr_db
from worker.evaluation.program import ProgramFile
from worker.evaluation.verify import check_samples, verify
from worker.export.program import export_program, open_program
from worker.export.registry import EXPORTERS, Exported
from worker.loading import load_model
from worker.model import Model
from worker.request import RunRequest
from worker.run import run_job
from worker.techniques.registry import TECHNIQUES

pytestmark = pytest.mark.usefixtures("known_memory")

SHAPE = (1, 28, 28)
SMALL = {"train": 512, "test": 300, "calibration": 64}
NAME = "program.pt2"
BERT = ("input_ids", "attention_mask")  # of a folder without a tokenizer
FEW_BITS = WeightOnly(bits=4, embeddings=8, algorithm="rtn", group_size=16)

# What docs/http.md tells whoever has downloaded it: nothing of this service is there, nor any package but torch.
LOAD = """
import sys
import torch
import torch.ao.quantization.fx._decomposed

program = torch.export.load(sys.argv[1]).module()
inputs, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(program(*inputs), wanted), (program(*inputs) - wanted).abs().max()
    for size in (1, 8):
        torch.testing.assert_close(program(*(one[:size] for one in inputs)), wanted[:size], rtol=1e-4, atol=1e-4)
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"worker", "app", "torchao", "onnx", "transformers"}))
"""


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Compiling takes half a minute; one test does it."""
    if "compiled" not in request.node.name:
        monkeypatch.setattr(compare, "measure_compiled", lambda *given: "the test leaves it out")


def done(request: RunRequest) -> tuple[Report, dict[str, ArtifactReport]]:
    report = run_job(request, Recorder()).report
    return report, {artifact.format: artifact for artifact in report.artifacts}


def in_a_fresh_process(path: Path, inputs: tuple[torch.Tensor, ...], folder: Path) -> torch.Tensor:
    """The outputs, which a process with torch alone must give as well."""
    with torch.no_grad():
        wanted: torch.Tensor = open_program(path).module()(*inputs)
    torch.save((inputs, wanted), folder / "case.pt")
    command = [sys.executable, "-c", LOAD, str(path), str(folder / "case.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""
    return wanted


def in_onnxruntime(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def test_lenet_in_both_forms(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    data = part_of(mnist, SMALL)
    module = copy.deepcopy(trained_lenet.module)
    steps: tuple[Step, ...] = (Prune(sparsity=0.6), Quantize())
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, data, steps, export=("onnx", "pt2"))
    _, artifacts = done(request)
    graph, program = artifacts["onnx"].measurement, artifacts["pt2"].measurement
    assert artifacts["pt2"].name == NAME
    assert program.runtime == "torch"
    assert (program.parameters, program.nonzero_parameters) == (graph.parameters, graph.nonzero_parameters)
    assert program.macs == graph.macs
    assert sorted(program.layers, key=lambda one: one.name) == sorted(graph.layers, key=lambda one: one.name)
    assert {layer.bits for layer in program.layers} == {8}
    assert program.metric is not None
    assert graph.metric is not None
    assert program.metric.value == pytest.approx(graph.metric.value, abs=0.02)
    assert artifacts["pt2"].details["calibration_method"] == artifacts["onnx"].details["calibration_method"]
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    outputs = in_a_fresh_process(request.output / NAME, (split.inputs[:64],), tmp_path).numpy()
    reference = in_onnxruntime(request.output / "model.onnx", input=split.inputs[:64].numpy())
    assert sqnr_db(reference, outputs) > 30


@pytest.mark.slow
def test_only_a_program_is_delivered_where_that_is_asked_for(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    data = part_of(mnist, SMALL)
    step = Quantize(rounding="nearest", smooth=False, exclude=("0", "11"))
    module = copy.deepcopy(trained_lenet.module)
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, data, (step,), export=("pt2", "native"))
    report, artifacts = done(request)
    bits = {layer.name: layer.bits for layer in artifacts["pt2"].measurement.layers}
    assert bits == {"0.weight": 32, "3.weight": 8, "7.weight": 8, "9.weight": 8, "11.weight": 32}
    assert "model.safetensors is floating point; the int8 weights are in program.pt2." in report.warnings
    assert [path.name for path in sorted(request.output.iterdir())] == ["model.safetensors", NAME]


@pytest.mark.slow
def test_a_program_that_eager_torch_runs_slowly_says_so_first(
    trained_lenet: Model, mnist: Data, tmp_path: Path
) -> None:
    module = copy.deepcopy(trained_lenet.module)
    step = Quantize(rounding="nearest", smooth=False, calibration={"method": "minmax"})  # type: ignore[arg-type]
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, part_of(mnist, SMALL), (step,), export=("pt2",))
    report, artifacts = done(request)
    assert artifacts["pt2"].speedup < 0.9
    assert report.warnings[0].startswith("program.pt2 is slower than the uploaded model")
    assert "torch.compile" in report.warnings[0]
    assert "not measured, since the test leaves it out" in report.warnings[0]


@pytest.mark.slow
def test_what_is_compiled_is_measured(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    module = copy.deepcopy(trained_lenet.module)
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, part_of(mnist, SMALL), (Quantize(),), export=("pt2",))
    report, artifacts = done(request)
    details = artifacts["pt2"].details
    assert float(str(details["compiled_median_s"])) < float(str(details["compiled_eager_s"]))
    assert "ms beside it (compiled once in" in report.warnings[0]


def delivered(model: Model, data: Data | None, steps: tuple[Step, ...], folder: Path) -> dict[str, Exported]:
    """Artifacts as a job writes and verifies them, without what it measures besides."""
    context = context_for(model, data, folder)
    for step in steps:
        TECHNIQUES[step.technique].apply(step, context)
    module = baked(context.model.module).eval()
    found = {name: EXPORTERS[name](module, context, folder) for name in ("onnx", "pt2")}
    verify(found["pt2"], module, check_samples(model, context.feed), lambda one: opened(model, one))
    return found


def opened(model: Model, one: Exported) -> ProgramFile:
    return ProgramFile(one.path, model.facts, 1, one.integers, one.sources, one.coded)


def test_few_bits_are_codes_in_the_program(trained_lenet: Model, mnist: Data, tmp_path: Path) -> None:
    """Of convolutions too, which no operator of ONNX Runtime is for."""
    data = part_of(mnist, SMALL)
    module = copy.deepcopy(trained_lenet.module)
    steps: tuple[Step, ...] = (WeightOnly.model_validate({"bits": 4, "algorithm": "hqq", "group_size": 16}),)
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, data, steps, export=("native", "onnx", "pt2"))
    report, artifacts = done(request)
    program = artifacts["pt2"].measurement
    assert {layer.bits for layer in program.layers} == {4}
    assert {layer.name for layer in program.layers} == {f"{place}.weight" for place in (0, 3, 7, 9, 11)}
    assert program.parameters == report.uploaded.parameters
    assert program.macs == report.uploaded.macs
    assert program.metric is not None
    assert artifacts["native"].measurement.metric is not None
    assert program.metric.value == artifacts["native"].measurement.metric.value  # the same weights
    assert not any("program.pt2 holds" in sentence for sentence in report.warnings)
    assert artifacts["pt2"].details["not_compiled"] == "the test leaves it out"
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    in_a_fresh_process(request.output / NAME, (split.inputs[:64],), tmp_path)
    with zipfile.ZipFile(request.output / NAME) as archive:
        tensors = sum(one.file_size for one in archive.infolist() if "/data/weights/weight_" in one.filename)
    weights, biases = 5 * 25 * 6 + 400 * 120 + 6 * 16 * 25, 6 + 16 + 120 + 84 + 10
    assert tensors < 0.5 * (weights + 120 * 84 + 84 * 10) * 2.05 + 4 * biases  # steps and zeros of groups of 16


@pytest.mark.parametrize(
    "steps", [pytest.param((), marks=pytest.mark.slow), (Quantize(rounding="nearest", smooth=False),), (FEW_BITS,)]
)
def test_a_model_of_transformers(steps: tuple[Step, ...], tmp_path: Path) -> None:
    bert(tmp_path / "model")
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    (tmp_path / "model.zip").write_bytes(content)
    model = load_model(tmp_path / "model.zip", "model.zip", {}, tmp_path)
    ids = torch.randint(0, 100, (32, 16), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids))
    found = delivered(model, tokens(inputs), steps, tmp_path)
    outputs = in_a_fresh_process(found["pt2"].path, inputs, tmp_path)
    named = dict(zip(BERT, inputs, strict=True))
    program = open_program(found["pt2"].path).module()
    with torch.no_grad():
        assert program(*(one[:3, :9] for one in inputs)).shape == (3, 3)  # sentences of another length
    reference = in_onnxruntime(found["onnx"].path, **{name: one.numpy() for name, one in named.items()})
    assert sqnr_db(reference, outputs.numpy()) > (20 if steps else 90)
    layers = {layer.name: layer for layer in opened(model, found["pt2"]).layers()}
    assert {layer.bits for layer in layers.values()} == ({4, 8} if FEW_BITS in steps else {8} if steps else {32})
    assert "bert.embeddings.word_embeddings.weight" in {name.removeprefix("module.") for name in layers}


class Encoded:
    """A split of sentences that are numbers already."""

    has_targets = False

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs[0])

    def classes(self) -> None:
        return None

    def read(self, indices: Sequence[int]) -> RawBatch:
        return RawBatch({name: one[list(indices)] for name, one in zip(BERT, self.inputs, strict=True)}, None)


def tokens(inputs: tuple[torch.Tensor, ...]) -> Data:
    split = Encoded(inputs)
    facts = tuple(TensorFacts(name=name, shape=(None,), dtype="int64") for name in BERT)
    splits = {"calibration": SplitFacts(samples=len(split), inputs=facts, targets=None)}
    return Data(DatasetFacts(kind="arrays", splits=splits), {"calibration": split})


def test_an_uploaded_graph_that_torch_computes(tmp_path: Path) -> None:
    """It ends in probabilities, and so does the program."""
    path, data = perceptron(tmp_path / "upload.onnx"), digits_data((1, 8, 8))
    model = load_model(path, "model.onnx", {"task": "image-classification"}, tmp_path)
    step = Quantize(rounding="nearest", smooth=False)
    found = delivered(model, data, (step,), tmp_path)
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    chances = in_a_fresh_process(found["pt2"].path, (split.inputs[:32],), tmp_path).numpy()
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)
    assert sqnr_db(in_onnxruntime(found["onnx"].path, pixels=split.inputs[:32].numpy()), chances) > 30
    assert {layer.bits for layer in opened(model, found["pt2"]).layers()} == {8}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_over_open_lengths_have_no_program(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    """torch.export takes their steps for a constant."""
    model = text_model(Recurrent(kind).eval(), classes=4)
    with pytest.raises(ExportFailed, match="could not export the model as a program") as caught:
        export_program(model.module, model, tmp_path / NAME)
    assert caught.value.pointer == "/export"


def test_a_graph_that_torch_does_not_compute_is_refused(tmp_path: Path) -> None:
    content = digits_graph().SerializeToString()
    spec = {"task": "image-classification"}
    data = digits_data((1, 8, 8))
    request = request_for(tmp_path, "model.onnx", content, spec, data, (Prune(sparsity=0.5),), export=("pt2",))
    with pytest.raises(Unsupported, match=r"control flow \(If\)") as caught:
        run_job(request, Recorder())
    assert caught.value.pointer == "/export"


@pytest.mark.parametrize("export", [("pt2",), ("native", "pt2")])
def test_dynamic_int8_is_not_delivered_as_a_program_alone(
    export: tuple[ExportFormat, ...], trained_lenet: Model, tmp_path: Path
) -> None:
    module = copy.deepcopy(trained_lenet.module)
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, None, (Quantize(method="dynamic"),), export=export)
    with pytest.raises(OrderRefused, match="add 'onnx' to export") as caught:
        run_job(request, Recorder())
    assert caught.value.pointer == "/export"


@pytest.mark.slow
def test_with_dynamic_int8_a_program_is_floating_point_and_says_so(trained_lenet: Model, tmp_path: Path) -> None:
    module = copy.deepcopy(trained_lenet.module)
    steps = (Quantize(method="dynamic"),)
    request = job(tmp_path, module, LENET_LAYERS, SHAPE, None, steps, export=("onnx", "pt2"))
    report, artifacts = done(request)
    assert "program.pt2 is floating point; the int8 weights are in model.onnx." in report.warnings
    assert {layer.bits for layer in artifacts["pt2"].measurement.layers} == {32}


def test_a_float_program_can_be_uploaded_again(trained_lenet: Model, tmp_path: Path) -> None:
    path = export_program(trained_lenet.module, trained_lenet, tmp_path / NAME)
    again = load_model(path, NAME, {"task": "image-classification"}, tmp_path)
    inputs = trained_lenet.example(4)
    with torch.no_grad():
        torch.testing.assert_close(again.module(*inputs), trained_lenet.module(*inputs))
    assert [one.name for one in again.facts.layers] == ["0", "3", "7", "9", "11"]
    second = export_program(again.module, again, tmp_path / "again.pt2")
    with torch.no_grad():
        torch.testing.assert_close(open_program(second).module()(*inputs), trained_lenet.module(*inputs))
