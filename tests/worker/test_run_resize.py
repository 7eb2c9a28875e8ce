"""Jobs that leave layers out, on models of every kind: what is delivered loads as what was uploaded did."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.contract.budgets import Budget
from app.contract.errors import Unsupported
from app.contract.report import Report
from app.contract.resizing import Resize
from app.contract.spec import Step
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import digits_data, part_of
from tests.worker.jobs import Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.loading.programs import exported
from tests.worker.test_run_compressed_tensors import bert
from worker.loading import load_model
from worker.loading.architecture import build
from worker.request import RunRequest
from worker.run import run_job

pytestmark = pytest.mark.usefixtures("known_memory")

PICTURE = (1, 8, 8)
BERT_WORDS = 100  # of the tiny one


def conv(channels: int, out: int | None = None, stride: int = 1) -> dict[str, Any]:
    return {
        "type": "Conv2d", "in_channels": channels, "out_channels": out or channels, "kernel_size": 3, "padding": 1,
        "stride": stride, "bias": False,
    }  # fmt: skip


def residual(channels: int) -> dict[str, Any]:
    norm = {"type": "BatchNorm2d", "num_features": channels}
    return {"type": "Residual", "layers": [conv(channels), norm, {"type": "ReLU"}, conv(channels), norm]}


STAGE = {"type": "Sequential", "layers": [residual(8), residual(8)]}
LONE = {"type": "Sequential", "layers": [residual(8)]}
WIDER = {"type": "Residual", "layers": [conv(8, 16, 2)], "shortcut": [conv(8, 16, 2)]}
LAYERS: list[dict[str, Any]] = [
    conv(1, 8), {"type": "ReLU"}, STAGE, LONE, WIDER, residual(16), residual(16),
    {"type": "AdaptiveAvgPool2d", "output_size": 1}, {"type": "Flatten"},
    {"type": "Linear", "in_features": 16, "out_features": 10},
]  # fmt: skip
BLOCKS = ["2.0", "2.1", "3.0", "5", "6"]


def resnet() -> nn.Sequential:
    from app.contract.architecture import Architecture

    torch.manual_seed(0)
    return build(Architecture.model_validate({"layers": LAYERS}).layers).eval()


def details(report: Report, step: int = 0) -> dict[str, Any]:
    return report.steps[step].details


def folder_request(folder: Path, steps: tuple[Step, ...], export: Any) -> RunRequest:
    content = zipped({path.name: path.read_bytes() for path in (folder / "model").iterdir()})
    return request_for(folder / "job", "model.zip", content, {}, None, steps, export=export)


def with_texts(request: RunRequest, folder: Path, vocabulary: int) -> RunRequest:
    """Eight random texts of six tokens, to look at the network with; no labels."""
    names = ["input_ids", "attention_mask"]
    ids = np.random.default_rng(0).integers(1, vocabulary, (8, 6))
    if vocabulary == BERT_WORDS:
        names.append("token_type_ids")
    values = dict(zip(names, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=False))
    np.savez(folder / "texts.npz", **{f"train_inputs.{name}": own for name, own in values.items()})
    spec = request.spec.model_copy(update={"dataset": "dst_" + "0" * 26})
    return replace(request, spec=spec, dataset_path=folder / "texts.npz", dataset_filename="texts.npz")


def test_an_architecture_comes_back_in_its_own_words(tmp_path: Path) -> None:
    step = Resize(layers=3, samples=64, training=Training(epochs=1, lr=3e-3))
    data = part_of(digits_data(PICTURE), {"train": 600, "test": 100})
    formats = {"export": ("native", "packed", "pt2")}
    request = job(tmp_path / "job", resnet(), LAYERS, PICTURE, data, (step,), **formats)
    report = run_job(request, Recorder()).report
    told = details(report)
    assert [row["name"] for row in told["blocks"]] == BLOCKS
    assert sum(row["dropped"] for row in told["blocks"]) == told["dropped_blocks"] == 3
    assert {row["name"]: row["why"] for row in told["left_alone"]} == {
        "4": "it gives [2, 16, 4, 4] where it takes [2, 8, 8, 8]"
    }
    own = {one.format: one for one in report.artifacts}
    assert list(own) == ["native", "packed", "pt2"]
    for one in own.values():
        assert one.measurement.parameters == told["parameters"] < 0.8 * told["parameters_before"]
        assert one.measurement.metric == own["native"].measurement.metric is not None
    assert own["native"].measurement.macs == told["macs"] < told["macs_before"]
    native = request.output / own["native"].name
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    assert sum(one.numel() for one in again.module.parameters()) == told["parameters"]
    x = torch.randn(3, *PICTURE)
    with torch.no_grad():
        program = torch.export.load(request.output / "program.pt2").module()
        assert torch.allclose(again.module(x), program(x), atol=1e-4)


def test_a_folder_stays_a_folder_with_fewer_layers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    uploaded = LlamaForCausalLM(config).eval()
    uploaded.save_pretrained(tmp_path / "model")
    step = Resize(budget=Budget(parameters=0.75), criterion="greedy", samples=4)
    request = folder_request(tmp_path, (step,), ("native", "packed"))
    request = with_texts(request, tmp_path, vocabulary=120)
    report = run_job(request, Recorder()).report
    told = details(report)
    gone = [row["name"] for row in told["blocks"] if row["dropped"]]
    assert len(gone) == told["dropped_blocks"] >= 1
    assert told["parameters_share"] <= 0.75
    assert [one.format for one in report.artifacts] == ["native", "packed"]
    assert not any("stands in" in warning for warning in report.warnings)
    with zipfile.ZipFile(request.output / "model.zip") as archive:
        archive.extractall(tmp_path / "again")  # our own file
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.num_hidden_layers == len(again.model.layers) == 4 - len(gone)
    left = [layer for place, layer in enumerate(uploaded.model.layers) if f"model.layers.{place}" not in gone]
    uploaded.model.layers = nn.ModuleList(left)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = uploaded(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, expected)
        generated = again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 10)  # with a cache, which goes by the layers' numbers


def test_a_classifier_of_half_the_layers_is_rounded_to_four_bits(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(tmp_path / "model", torch.float16)
    step = Resize(layers=1, samples=4)
    steps = (step, WeightOnly(algorithm="rtn", bits=4, group_size=32, symmetric=True))
    request = with_texts(
        folder_request(tmp_path, steps, ("native", "compressed-tensors")), tmp_path, vocabulary=BERT_WORDS
    )
    report = run_job(request, Recorder()).report
    assert [one.format for one in report.artifacts] == ["native", "compressed-tensors"]
    with zipfile.ZipFile(request.output / "model.zip") as archive:
        archive.extractall(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert len(again.bert.encoder.layer) == again.config.num_hidden_layers == 1
    assert next(again.parameters()).dtype == torch.float16


def test_weights_with_a_config_come_back_with_the_smaller_one(tmp_path: Path) -> None:
    module = bert(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    request = request_for(
        tmp_path / "job", "w.safetensors", content, {"config": config}, None, (Resize(layers=1, samples=4),),
        export=("native",),
    )  # fmt: skip
    request = with_texts(request, tmp_path, vocabulary=BERT_WORDS)
    report = run_job(request, Recorder()).report
    spec = json.loads(details(report)["spec"])
    assert spec["config"]["num_hidden_layers"] == 1
    native = request.output / report.artifacts[0].name
    again = load_model(native, native.name, spec, tmp_path)
    assert again.facts.parameters == details(report)["parameters"] < sum(own.numel() for own in module.parameters())


def test_behind_layers_of_sizes_of_their_own_a_program_stands_in(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    steps = (StructuredPrune(sparsity=0.2), Resize(layers=1, samples=4))
    request = with_texts(folder_request(tmp_path, steps, ("native",)), tmp_path, vocabulary=BERT_WORDS)
    report = run_job(request, Recorder()).report
    (artifact,) = report.artifacts
    assert artifact.format == "pt2"
    assert artifact.measurement.parameters == details(report, 1)["parameters"]


def test_what_cannot_go_is_refused_by_name(tmp_path: Path) -> None:
    layers = [{"type": "Flatten"}, {"type": "Sequential", "layers": [{"type": "Linear", "in_features": 64,
               "out_features": 10}]}]  # fmt: skip
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 10)))
    data = part_of(digits_data(PICTURE), {"train": 60, "test": 20})
    with pytest.raises(Unsupported, match=r"1: it gives \[2, 10\] where it takes \[2, 64\]"):
        run_job(job(tmp_path / "job", module, layers, PICTURE, data, (Resize(layers=1),)), Recorder())


def test_a_program_has_no_blocks(tmp_path: Path) -> None:
    content = exported(resnet(), torch.randn(2, *PICTURE))
    data = part_of(digits_data(PICTURE), {"train": 60, "test": 20})
    spec = {"task": "image-classification"}
    request = request_for(tmp_path / "job", "upload.pt2", content, spec, data, (Resize(layers=1),), export=("native",))
    with pytest.raises(Unsupported, match="holds no blocks"):
        run_job(request, Recorder())
