"""Whole jobs that put a student in the model's place: of its own kind, described, uploaded; delivered and measured."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save

from app.contract.calibration import Calibration
from app.contract.cast import Cast
from app.contract.distillation import ArchitectureStudent
from app.contract.errors import InvalidSpec, ModelRejected, ModelsMismatch, Unsupported
from app.contract.report import Report
from app.contract.spec import DistillStep, Finetune, Quantize
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from tests.worker.helpers import MemorySplit, context_for, memory_data, part_of
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import bert
from tests.worker.nets import lenet
from worker.data.base import Data
from worker.loading import load_model
from worker.model import Model
from worker.request import NamedModel, RunRequest
from worker.run import run_job
from worker.students.students import student_of

pytestmark = pytest.mark.usefixtures("known_memory")

SHAPE = (1, 28, 28)
OTHER = "mdl_" + "1" * 26
SMALL = {"train": 512, "test": 300}
FLAT = {"type": "Flatten"}


def dense(classes: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": 784, "out_features": classes}


LINEAR: list[dict[str, Any]] = [FLAT, dense(10)]
TRAINING = {"epochs": 4, "lr": 3e-3, "distill": {"alpha": 0.9}}


@pytest.fixture(scope="module")
def digits(mnist: Data) -> Data:
    return part_of(mnist, SMALL)


def request_of(
    folder: Path, model: Model, data: Data, student: dict[str, Any] | None, *more: Any, **training: Any
) -> RunRequest:
    step = DistillStep.model_validate({"technique": "distill", "student": student, "training": TRAINING | training})
    return job(folder, model.module, LENET_LAYERS, SHAPE, data, (step, *more))


def named(folder: Path, spec_layers: list[dict[str, Any]], content: bytes, **changes: Any) -> NamedModel:
    path = folder / "other.safetensors"
    path.write_bytes(content)
    spec = {
        "task": "image-classification",
        "architecture": {"layers": spec_layers},
        "input": {"shape": list(SHAPE), "dtype": "float32"},
    }
    return NamedModel(OTHER, path, "other.safetensors", spec | changes)


def accuracy(path: Path, data: Data) -> float:
    """On the test split, by ONNX Runtime alone."""
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": split.inputs.numpy()})[0]
    return float(np.mean(logits.argmax(1) == split.targets.numpy()))


def by_format(report: Report) -> dict[str, Any]:
    return {one.format: one for one in report.artifacts}


def test_a_quarter_of_the_model_is_delivered_and_measured(trained_lenet: Model, digits: Data, tmp_path: Path) -> None:
    quantize = Quantize(calibration=Calibration(samples=64))
    request = request_of(tmp_path / "job", trained_lenet, digits, {"kind": "auto"}, quantize)
    report = run_job(request, Recorder()).report
    details = report.steps[0].details
    assert details["teacher_parameters"] == 61_706
    assert report.uploaded.parameters == 61_706
    student = details["student_parameters"]
    assert isinstance(student, int)
    assert 0.2 * 61_706 < student <= 0.25 * 61_706
    native = by_format(report)["native"].measurement
    assert native.parameters == student
    assert native.macs == details["student_macs"]
    assert report.uploaded.macs == details["teacher_macs"]
    assert native.metric is not None
    assert native.metric.value > 0.8  # untrained, a tenth
    state = load_file(request.output / "model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == student
    spec = json.loads(str(details["student_spec"]))
    again = load_model(request.output / "model.safetensors", "model.safetensors", spec, tmp_path)
    assert again.facts.parameters == student
    onnx = by_format(report)["onnx"].measurement.metric
    assert onnx is not None
    assert onnx.value == accuracy(request.output / "model.onnx", digits)


def test_a_described_network_learns_from_the_upload_without_labels(
    trained_lenet: Model, digits: Data, tmp_path: Path
) -> None:
    train, test = digits.splits["train"], digits.splits["test"]
    assert isinstance(train, MemorySplit)
    assert isinstance(test, MemorySplit)
    data = memory_data({"train": (train.inputs, None), "test": (test.inputs, test.targets)})
    student = {"kind": "architecture", "architecture": {"layers": LINEAR}}
    request = request_of(tmp_path / "job", trained_lenet, data, student)
    report = run_job(request, Recorder()).report
    details = report.steps[0].details
    assert details["training_targets"] == "the teacher's alone"
    assert details["student_parameters"] == 7850
    assert accuracy(request.output / "model.onnx", data) > 0.6
    # The file is that of the architecture that the client described.
    spec = dict(request.model_spec) | {"architecture": {"layers": LINEAR}}
    again = load_model(request.output / "model.safetensors", "model.safetensors", spec, tmp_path)
    assert again.facts.parameters == 7850


@pytest.mark.slow
def test_another_uploaded_model_is_the_student_and_a_third_teaches(
    trained_lenet: Model, digits: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    request = request_of(tmp_path / "job", trained_lenet, digits, {"kind": "model", "model": OTHER})
    request = replace(request, named=(named(tmp_path, LINEAR, save(linear.state_dict())),))
    report = run_job(request, Recorder()).report
    assert report.steps[0].details["student"] == f"the uploaded model {OTHER}"
    assert by_format(report)["native"].measurement.parameters == 7850
    assert report.uploaded.parameters == 61_706
    metric = by_format(report)["onnx"].measurement.metric
    assert metric is not None
    assert metric.value == accuracy(request.output / "model.onnx", digits) > 0.6


def test_layers_that_a_student_lacks_are_named(trained_lenet: Model, digits: Data, tmp_path: Path) -> None:
    student = {"kind": "architecture", "architecture": {"layers": LINEAR}}
    request = request_of(
        tmp_path / "job", trained_lenet, digits, student, Quantize(exclude=("3",)), steps=1, epochs=None
    )
    with pytest.raises(InvalidSpec, match=r"'3' matches no layer\. The model's layers are 1") as caught:
        run_job(request, Recorder())
    assert caught.value.pointer == "/steps/1/exclude/0"


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [pytest.param("bfloat16", ["2.weight", "2.bias"], marks=pytest.mark.slow), ("float8_e4m3", ["2.weight"])],
)
def test_what_follows_is_about_the_layers_of_the_student(
    dtype: Any, kept: list[str], trained_lenet: Model, digits: Data, tmp_path: Path
) -> None:
    """The upload has no weights in its layer 2."""
    layers = [*LINEAR, {"type": "Linear", "in_features": 10, "out_features": 10}]
    student = {"kind": "architecture", "architecture": {"layers": layers}}
    step = Cast(dtype=dtype, exclude=("2",))
    request = request_of(tmp_path / "job", trained_lenet, digits, student, step, steps=1, epochs=None)
    report = run_job(request, Recorder()).report
    left = report.steps[1].details["layers_left_in_float"]
    assert isinstance(left, list)
    assert [row["name"] for row in left] == kept


@pytest.mark.slow
def test_an_ensemble_teaches_the_model_itself(trained_lenet: Model, digits: Data, tmp_path: Path) -> None:
    step = Finetune(training=Training.model_validate({"steps": 5, "distill": {"teacher": ["uploaded", OTHER]}}))
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, digits, (step,), export=("native",))
    other = named(tmp_path, LENET_LAYERS, save(lenet(seed=3).state_dict()))
    report = run_job(replace(request, named=(other,)), Recorder()).report
    assert report.steps[0].details["distill_losses"] == "soft_targets"
    assert by_format(report)["native"].measurement.parameters == 61_706


def test_another_model_teaches_in_a_training_in_front(trained_lenet: Model, digits: Data, tmp_path: Path) -> None:
    lasso = {"training": {"steps": 3, "distill": {"teacher": OTHER}}}
    step = StructuredPrune.model_validate({"sparsity": 0.2, "lasso": lasso})
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, digits, (step,), export=("native",))
    other = named(tmp_path, LENET_LAYERS, save(lenet(seed=3).state_dict()))
    report = run_job(replace(request, named=(other,)), Recorder()).report
    assert report.steps[0].details["lasso_last_epoch_loss"]
    assert by_format(report)["native"].measurement.parameters < 61_706


def test_models_that_do_not_fit_are_refused_before_anything_is_computed(
    trained_lenet: Model, digits: Data, tmp_path: Path
) -> None:
    layers = [FLAT, dense(4)]
    four = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 4))
    request = request_of(tmp_path / "job", trained_lenet, digits, {"kind": "model", "model": OTHER})
    request = replace(request, named=(named(tmp_path, layers, save(four.state_dict())),))
    with pytest.raises(ModelsMismatch, match="gives 4 outputs") as caught:
        run_job(request, Recorder())
    assert caught.value.pointer == "/steps/0/student/model"


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"kind": "auto", "parameters": 1e-4}, "The smallest student"),
        ({"kind": "auto", "shrink": "depth"}, "no row of equal layers"),
        ({"kind": "architecture", "config": {"model_type": "bert"}}, "give architecture"),
        ({"kind": "architecture", "architecture": {"layers": [FLAT, dense(3)]}}, "gives 3 outputs"),
    ],
)
def test_students_that_cannot_be_are_refused(
    student: dict[str, Any], words: str, trained_lenet: Model, digits: Data, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=words) as caught:
        run_job(request_of(tmp_path / "job", trained_lenet, digits, student), Recorder())
    assert caught.value.pointer is not None
    assert caught.value.pointer.startswith("/steps/0")


def test_layers_that_do_not_fit_are_named_at_their_place(trained_lenet: Model, digits: Data, tmp_path: Path) -> None:
    layers = [FLAT, {"type": "Linear", "in_features": 783, "out_features": 10}]
    student = {"kind": "architecture", "architecture": {"layers": layers}}
    with pytest.raises(InvalidSpec, match="layer '1'") as caught:
        run_job(request_of(tmp_path / "job", trained_lenet, digits, student), Recorder())
    assert caught.value.pointer == "/steps/0/student/architecture/layers"


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small BERT classifier as a folder in a zip."""
    folder = tmp_path_factory.mktemp("bert")
    bert(folder)
    path = folder.parent / "bert.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return path.read_bytes()


def ids(count: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 8)
    return memory_data({"train": (torch.randint(1, 10, shape, generator=generator), None)})


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "large"},
        {"num_attention_heads": 5},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"num_hidden_layers": 10_000},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "nothing", "architectures": ["Nothing"]},
        {"hidden_act": "nothing"},
    ],
)
def test_a_config_of_nonsense_is_refused_as_an_upload_is(config: dict[str, Any], zipped: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bert.zip"
    path.write_bytes(zipped)
    model = load_model(path, "bert.zip", {}, tmp_path)
    context = context_for(model, None, tmp_path)
    student = ArchitectureStudent.model_validate({"kind": "architecture", "config": config})
    with pytest.raises((ModelRejected, Unsupported)):
        student_of(context, student, 1)


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "auto", "parameters": 0.6},
        pytest.param({"kind": "auto", "shrink": "depth", "parameters": 0.9}, marks=pytest.mark.slow),
        pytest.param({"kind": "architecture", "config": {"num_hidden_layers": 1}}, marks=pytest.mark.slow),
    ],
)
def test_a_folder_comes_back_as_a_folder_of_the_student(student: dict[str, Any], zipped: bytes, tmp_path: Path) -> None:
    step = DistillStep.model_validate(
        {
            "technique": "distill",
            "student": student,
            "training": {"steps": 4, "batch_size": 4, "distill": {"losses": [{"kind": "hidden_states"}]}},
        }
    )
    data = ids(8)
    request = request_for(tmp_path / "job", "bert.zip", zipped, {}, None, (step,), export=("native",))
    arrays = request.model_path.with_name("ids.npz")
    split = data.splits["train"]
    assert isinstance(split, MemorySplit)
    mask = np.ones((8, 8), dtype=np.int64)
    np.savez(arrays, **{"train_inputs.input_ids": split.inputs.numpy(), "train_inputs.attention_mask": mask})
    spec = request.spec.model_copy(update={"dataset": "dst_" + "0" * 26})
    request = replace(request, dataset_path=arrays, dataset_filename="ids.npz", dataset_spec={}, spec=spec)
    report = run_job(request, Recorder()).report
    native = by_format(report)["native"]
    assert native.name == "model.zip"
    assert native.measurement.parameters == report.steps[0].details["student_parameters"]
    assert native.measurement.parameters < report.uploaded.parameters
    with zipfile.ZipFile(request.output / "model.zip") as archive:
        config = json.loads(archive.read("config.json"))
        before = json.loads(zipfile.ZipFile(request.model_path).read("config.json"))
        assert "vocab.txt" not in before or "vocab.txt" in archive.namelist()
    assert config["num_hidden_layers"] <= before["num_hidden_layers"]
    assert config["id2label"] == before["id2label"]
    again = load_model(request.output / "model.zip", "model.zip", {}, tmp_path)
    assert again.facts.parameters == native.measurement.parameters
