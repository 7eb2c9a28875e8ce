"""Jobs that fuse, on models of every kind: what is delivered gives what was uploaded, with less in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.architecture import Architecture
from app.contract.calibration import Calibration
from app.contract.errors import Unsupported
from app.contract.fusing import Fuse
from app.contract.report import Report
from app.contract.spec import Finetune, Quantize, Step
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from tests.worker.helpers import digits_data, part_of
from tests.worker.jobs import Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.loading.programs import ConvNet, exported, image
from worker.export.program import export_program, open_program
from worker.loading import load_model
from worker.loading.layers import build
from worker.request import RunRequest
from worker.run import Clock, optimize, run_job
from worker.techniques.structure.fuse import FuseTechnique

pytestmark = pytest.mark.usefixtures("known_memory")

PICTURE = (1, 8, 8)
DATA = part_of(digits_data(PICTURE), {"train": 300, "test": 100, "calibration": 32})


def conv(channels: int, out: int, **options: Any) -> dict[str, Any]:
    return {"type": "Conv2d", "in_channels": channels, "out_channels": out, "kernel_size": 3, "padding": 1} | options


def norm(channels: int) -> dict[str, Any]:
    return {"type": "BatchNorm2d", "num_features": channels}


RELU = {"type": "ReLU"}
INNER = [conv(8, 8, bias=False, groups=8), norm(8), RELU, conv(8, 8), norm(8)]
LAYERS: list[dict[str, Any]] = [
    conv(1, 8, bias=False), norm(8), RELU, RELU,
    {"type": "Residual", "layers": INNER, "shortcut": [conv(8, 8, bias=False), norm(8)]},
    {"type": "Parallel", "branches": [[conv(8, 8), norm(8)], [norm(8)], [{"type": "Identity"}]]},
    {"type": "Sequential", "layers": [conv(24, 16), {"type": "Identity"}, norm(16)]}, RELU,
    {"type": "AdaptiveAvgPool2d", "output_size": 1}, {"type": "Flatten"}, {"type": "Dropout", "p": 0.1},
    {"type": "Linear", "in_features": 16, "out_features": 10},
]  # fmt: skip


def trained(module: nn.Module) -> nn.Module:
    """With statistics and factors of which each says something."""
    torch.manual_seed(0)
    for own in module.modules():
        if isinstance(own, nn.BatchNorm2d):
            assert own.running_mean is not None
            assert own.running_var is not None
            nn.init.normal_(own.running_mean, std=0.1)
            nn.init.uniform_(own.running_var, 0.5, 2.0)
            nn.init.uniform_(own.weight, 0.5, 1.5)
            nn.init.normal_(own.bias, std=0.1)
    return module.eval()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = trained(build(Architecture.model_validate({"layers": LAYERS}).layers))
    assert isinstance(module, nn.Sequential)
    return module


def details(report: Report, step: int = 0) -> dict[str, Any]:
    return report.steps[step].details


def taken(request: RunRequest) -> dict[str, Any]:
    """Of a job of one step, up to its export."""
    _, (step,) = optimize(request, Recorder(), None, Clock())
    return step.details


def done(told: dict[str, Any]) -> dict[str, int]:
    return {row["pass"]: row["done"] for row in told["passes"]}


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def test_an_architecture_comes_back_in_its_own_words(tmp_path: Path) -> None:
    module = network()
    request = job(tmp_path / "job", module, LAYERS, PICTURE, DATA, (Fuse(),), export=("native", "packed", "pt2"))
    report = run_job(request, Recorder()).report
    told = details(report)
    assert done(told) == {"batch_norm": 6, "constants": 0, "identities": 3, "common": 0, "dead": 0}
    assert {row["name"]: row["into"] for row in told["batch_norms"]} == {
        "1": "0", "4.layers.1": "4.layers.0", "4.layers.4": "4.layers.3", "4.shortcut.1": "4.shortcut.0",
        "5.branches.0.1": "5.branches.0.0", "6.2": "6.0",
    }  # fmt: skip
    assert [row["name"] for row in told["left_alone"]] == ["5.branches.1.0"]
    assert told["parameters"] < told["parameters_before"]
    assert told["operators"] < told["operators_before"]
    assert told["difference"] <= 1e-5
    artifacts = {one.format: one for one in report.artifacts}
    assert artifacts["packed"].measurement.size_bytes < report.uploaded.size_bytes
    assert artifacts["native"].metric_change == pytest.approx(0.0)
    spec = json.loads(told["spec"])
    kinds = [layer["type"] for layer in spec["architecture"]["layers"]]
    assert kinds == [
        "Conv2d", "ReLU", "Residual", "Parallel", "Sequential", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Dropout",
        "Linear",
    ]  # fmt: skip
    path = request.output / artifacts["native"].name
    again = load_model(path, path.name, spec, tmp_path)
    for batch in (1, 5):
        x = torch.randn(batch, *PICTURE)
        with torch.no_grad():
            assert alike(again.module(x), module(x))


def test_what_stays_by_name(tmp_path: Path) -> None:
    step = Fuse(passes=("batch_norm",), exclude=("4", "6.0"))
    told = taken(job(tmp_path, network(), LAYERS, PICTURE, None, (step,), export=("native",)))
    assert [row["name"] for row in told["batch_norms"]] == ["1", "5.branches.0.1"]
    why = {row["name"]: row["why"] for row in told["left_alone"]}
    assert why["4.layers.1"] == why["6.2"] == "it is excluded"


def test_a_job_of_fewer_channels_in_int8(tmp_path: Path) -> None:
    training = Training(epochs=1, lr=1e-3)
    steps: tuple[Step, ...] = (
        Fuse(),
        StructuredPrune(sparsity=0.3, round_to=1, criterion="l2", training=training),
        Quantize(method="static", calibration=Calibration(samples=16), rounding="nearest", equalize=False),
    )
    report = run_job(
        job(tmp_path, network(), LAYERS, PICTURE, DATA, steps, export=("native", "onnx")), Recorder()
    ).report
    assert done(details(report))["batch_norm"] == 6
    assert details(report, 1)["parameters"] < 0.9 * details(report)["parameters"]
    onnx = next(one for one in report.artifacts if one.format == "onnx")
    assert any(layer.bits == 8 for layer in onnx.measurement.layers)


def test_a_program_is_smaller_and_gives_the_same(tmp_path: Path) -> None:
    module = trained(ConvNet())
    content = exported(module, image())
    request = request_for(
        tmp_path / "job", "upload.pt2", content, {"task": "image-classification"}, DATA,
        (Fuse(), Finetune(training=Training(steps=2, lr=1e-12, optimizer="sgd"))), export=("native", "onnx"),
    )  # fmt: skip
    report = run_job(request, Recorder()).report
    assert done(details(report))["batch_norm"] == 2
    native = next(one for one in report.artifacts if one.format == "native")
    assert native.measurement.size_bytes < report.uploaded.size_bytes
    program = torch.export.load(request.output / native.name)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert not [name for name in program.state_dict if "running" in name]
    for batch in (1, 5):
        x = image(batch)
        with torch.no_grad():
            assert alike(program.module()(x), module(x))


def test_of_a_folder_of_transformers_a_program_stands_in(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    module = trained(ResNetForImageClassification(config))
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    request = request_for(tmp_path / "job", "model.zip", content, {}, None, (Fuse(),), export=("native",))
    context, (step,) = optimize(request, Recorder(), None, Clock())
    told = step.details
    assert done(told)["batch_norm"] == sum(isinstance(own, nn.BatchNorm2d) for own in module.modules())
    assert "left_alone" not in told
    assert context.model.native_as == "pt2"
    program = open_program(export_program(context.model.module, context.model, tmp_path / "program.pt2")).module()
    x = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        assert alike(program(x), module(x).logits)


def test_weights_in_half_precision_keep_their_norms(tmp_path: Path) -> None:
    module = network().half()
    request = job(tmp_path, module, LAYERS, PICTURE, None, (Fuse(),), export=("native",))
    told = taken(request)
    assert done(told)["batch_norm"] == 0
    assert "stores its weights in float16" in told["left_alone"][0]["why"]


def test_a_graph_in_half_precision_is_refused(tmp_path: Path) -> None:
    content = exported(ConvNet().eval().half(), image().half())
    path = tmp_path / "upload.pt2"
    path.write_bytes(content)
    model = load_model(path, path.name, {"task": "image-classification"}, tmp_path)
    assert "narrower floats" in (FuseTechnique().applies(Fuse(), model) or "")
    request = request_for(
        tmp_path / "job", "upload.pt2", content, {"task": "image-classification"}, None, (Fuse(),), export=("native",)
    )
    with pytest.raises(Unsupported, match="narrower floats"):
        run_job(request, Recorder())
