"""Jobs with a cast: every artifact in the type that was asked for, read by other programs than the one at test."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file
from torch import Tensor, nn

from app.contract.cast import Cast
from app.contract.errors import InvalidSpec, OrderRefused
from app.contract.report import ArtifactReport, Report
from app.contract.spec import ExportFormat, Finetune, Prune
from tests.worker.fresh import answers
from tests.worker.helpers import context_for, mlp
from tests.worker.jobs import LENET_LAYERS, Recorder, job
from tests.worker.loading.files import folder_files, zipped
from tests.worker.loading.onnx_files import noise, run
from tests.worker.loading.program_nets import token_ids
from tests.worker.loading.programs import ConvNet, exported, image
from tests.worker.nets import lenet
from tests.worker.test_run import SHAPE
from tests.worker.test_run_compressed_tensors import bert, llama, request
from worker.constraints import baked
from worker.evaluation.layers import graph_layers
from worker.export.registry import EXPORTERS, Exported
from worker.loading import load_model
from worker.packed import load
from worker.request import RunRequest
from worker.run import run_job
from worker.techniques.quantization.quantize import QuantizeTechnique

pytestmark = pytest.mark.usefixtures("known_memory")

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ONNX = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float8_e4m3": TensorProto.FLOAT8E4M3FN}


def done(request: RunRequest) -> tuple[Report, dict[str, ArtifactReport]]:
    report = run_job(request, Recorder()).report
    return report, {artifact.format: artifact for artifact in report.artifacts}


def in_a_fresh_process(path: Path, inputs: np.ndarray) -> np.ndarray:
    found: np.ndarray = answers("onnxruntime", path, inputs, path.parent, len(inputs))
    return found


def check_outputs(path: Path, state: Mapping[str, Tensor]) -> None:
    """An ONNX file gives what the LeNet gives with these weights."""
    wide = lenet().eval()
    wide.load_state_dict(state)
    inputs = noise(3, *SHAPE)
    with torch.no_grad():
        outputs = wide(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(in_a_fresh_process(path, inputs), outputs, rtol=1e-4, atol=1e-5)


def written(
    folder: Path, filename: str, content: bytes, spec: dict[str, Any], step: Cast, *formats: ExportFormat
) -> dict[str, Exported]:
    """The artifacts of a job, without its measurements."""
    for name in ("scratch", "output"):
        (folder / name).mkdir(parents=True)
    (folder / filename).write_bytes(content)
    model = load_model(folder / filename, filename, spec, folder / "scratch")
    context = context_for(model, None, folder / "scratch")
    technique = QuantizeTechnique()
    assert technique.applies(step, model) is None
    technique.apply(step, context)
    module = context.model.round_as_stored(baked(context.model.module))
    return {name: EXPORTERS[name](module, context, folder / "output") for name in formats}


def bits_of(artifact: ArtifactReport) -> set[float]:
    return {layer.bits for layer in artifact.measurement.layers}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_halves_in_every_artifact(tmp_path: Path, dtype: Any) -> None:
    module = lenet().eval()
    asked = job(tmp_path, module, LENET_LAYERS, SHAPE, None, (Cast(dtype=dtype),), export=("native", "onnx", "packed"))
    report, artifacts = done(asked)
    expected = {name: tensor.to(TORCH[dtype]) for name, tensor in module.state_dict().items()}
    for found in (load_file(asked.output / "model.safetensors"), load(asked.output / "model.tsr")):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == TORCH[dtype]
            assert torch.equal(found[name], tensor)
    check_outputs(asked.output / "model.onnx", expected)
    held = {one.name: one.data_type for one in onnx.load(asked.output / "model.onnx").graph.initializer}
    assert all(held[name] == ONNX[dtype] for name in expected if name.endswith("weight"))
    assert bits_of(artifacts["native"]) == bits_of(artifacts["onnx"]) == {16}
    for format in ("native", "onnx"):
        assert artifacts[format].size_ratio > 1.95
    assert not any("bits for" in warning for warning in report.warnings)
    rows = report.steps[0].details["layers"]
    assert isinstance(rows, list)
    assert len(rows) == 5


def test_float8_in_onnx_and_on_its_grid_elsewhere(tmp_path: Path) -> None:
    module, step = lenet().eval(), Cast(dtype="float8_e4m3", exclude=("11",))
    asked = job(
        tmp_path, module, LENET_LAYERS, SHAPE, None, (Prune(sparsity=0.5), step), export=("native", "onnx", "packed")
    )
    report, artifacts = done(asked)
    native = load_file(asked.output / "model.safetensors")
    packed = load(asked.output / "model.tsr")
    assert all(torch.equal(packed[name], native[name]) for name in native)
    check_outputs(asked.output / "model.onnx", native)
    held = {one.name: one.data_type for one in onnx.load(asked.output / "model.onnx").graph.initializer}
    assert {held[f"{layer}.weight"] for layer in (0, 3, 7, 9)} == {ONNX["float8_e4m3"]}
    assert held["11.weight"] == TensorProto.FLOAT
    assert artifacts["onnx"].size_ratio > 3.4
    assert bits_of(artifacts["native"]) == {32}
    assert any("model.safetensors takes more than 8 bits for 4 of the 4 weights" in one for one in report.warnings)
    assert not any("model.onnx takes" in one for one in report.warnings)
    for name in ("3.weight", "7.weight", "9.weight"):
        assert len(native[name][0].unique()) <= 255


@pytest.mark.parametrize(("exclude", "told"), [((), "bfloat16"), (("model.layers.0.mlp.*",), "float32")])
def test_a_folder_of_transformers_says_what_it_holds(tmp_path: Path, exclude: tuple[str, ...], told: str) -> None:
    from transformers import AutoModelForCausalLM

    given = llama(tmp_path / "model")
    content = zipped(folder_files(tmp_path / "model"))
    native = written(tmp_path / "job", "model.zip", content, {}, Cast(exclude=exclude), "native")["native"]
    with zipfile.ZipFile(native.path) as archive:
        archive.extractall(tmp_path / "small")  # our own file
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == told
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert module.dtype == getattr(torch, told)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    again = load_model(native.path, "model.zip", {}, tmp_path)
    for name, tensor in given.state_dict().items():
        kept = name.startswith("model.layers.0.mlp.") and bool(exclude)
        dtype = torch.float32 if kept else torch.bfloat16
        assert torch.equal(module.state_dict()[name].float(), tensor if kept else tensor.bfloat16().float())
        assert name not in stored or stored[name].dtype == dtype
        assert again.stored[name] == dtype


def test_weights_with_a_config_come_back_narrow(tmp_path: Path) -> None:
    given = llama(tmp_path / "model", tied=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    made = written(tmp_path / "job", "model.safetensors", content, {"config": config}, Cast(), "native")
    stored = load_file(made["native"].path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], given.state_dict()["lm_head.weight"].bfloat16())


def test_weights_whose_names_transformers_changes_come_back_narrow_too(tmp_path: Path) -> None:
    """The head of a GPT-NeoX is called `lm_head` in the network and `embed_out` in files."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    given = load_file(tmp_path / "model" / "model.safetensors")
    spec = {"config": json.loads((tmp_path / "model" / "config.json").read_text())}
    made = written(tmp_path / "job", "model.safetensors", content, spec, Cast(), "native")
    stored = load_file(made["native"].path)
    assert "embed_out.weight" in stored
    for name, tensor in given.items():
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert stored[name].dtype == wanted.dtype, name
        assert torch.equal(stored[name], wanted)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_transformers_loads_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(tmp_path / "model", dtype)
    step = Cast(dtype="float8_e4m3", exclude=("classifier",))
    content = zipped(folder_files(tmp_path / "model"))
    made = written(tmp_path / "job", "model.zip", content, {}, step, "native", "compressed-tensors", "onnx")
    for format, folder in (("native", "plain"), ("compressed-tensors", "small")):
        with zipfile.ZipFile(made[format].path) as archive:
            archive.extractall(tmp_path / folder)  # our own file
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            assert small.get_submodule(name).weight.dtype == dtype
            assert torch.equal(small.get_submodule(name).weight, layer.weight)
    told = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert (told["format"], told["ignore"]) == ("float-quantized", ["classifier"])
    stored = load_file(tmp_path / "small" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{name}.weight_scale"].shape == (64, 1)
    assert made["compressed-tensors"].bits is not None
    assert made["compressed-tensors"].bits[f"{name}.weight"] == 8
    proto = onnx.load(made["onnx"].path)
    assert {layer.name: layer.bits for layer in graph_layers(proto, proto)}[f"{name}.weight"] == 8
    inputs = {value.name: np.arange(20, dtype=np.int64).reshape(1, 20) % 2 for value in proto.graph.input}
    with torch.no_grad():
        expected = plain.float()(**{key: torch.from_numpy(array) for key, array in inputs.items()}).logits
    np.testing.assert_allclose(run(proto, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_job_delivers_float8_for_transformers(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    report, artifacts = done(request(tmp_path, (Cast(dtype="float8_e4m3"),), ("compressed-tensors",)))
    own = artifacts["compressed-tensors"].measurement
    assert {layer.bits for layer in own.layers if "attention" in layer.name and layer.name.endswith("weight")} == {8}
    assert not any("takes more" in warning for warning in report.warnings)


def test_other_types_have_no_compressed_folder(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    with pytest.raises(InvalidSpec, match="transformers loads it as it is") as refused:
        run_job(request(tmp_path, (Cast(),), ("compressed-tensors",)), Recorder())
    assert refused.value.pointer == "/steps/0/dtype"


def test_nothing_trains_behind_it(tmp_path: Path) -> None:
    asked = job(tmp_path, lenet(), LENET_LAYERS, SHAPE, None, (Cast(), Finetune()))
    with pytest.raises(OrderRefused, match="has to be the last step"):
        run_job(asked, Recorder())


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_an_uploaded_graph_comes_back_narrow_and_is_taken_again(tmp_path: Path, dtype: Any) -> None:
    module = mlp().eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        module,
        (torch.randn(2, 64),),
        tmp_path / "upload.onnx",
        input_names=["pixels"],
        dynamic_shapes=shapes,
        external_data=False,
    )
    content, spec, step = (tmp_path / "upload.onnx").read_bytes(), {"task": "image-classification"}, Cast(dtype=dtype)
    made = written(tmp_path / "job", "model.onnx", content, spec, step, "native", "onnx", "packed")
    for tensor in module.state_dict().values():
        tensor.copy_(tensor.to(TORCH[dtype]))
    inputs = noise(4, 64)
    with torch.no_grad():
        expected = module(torch.from_numpy(inputs)).numpy()
    for format in ("native", "onnx"):
        proto = onnx.load(made[format].path)
        assert {layer.bits for layer in graph_layers(proto, proto)} == {16}
        np.testing.assert_allclose(run(proto, {"pixels": inputs}), expected, rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in load(made["packed"].path).values()} == {TORCH[dtype]}
    native = made["native"].path
    again = load_model(native, native.name, spec, tmp_path)
    assert again.facts.trainable
    assert [layer.type for layer in again.facts.layers] == ["Linear"] * 3
    with torch.no_grad():
        np.testing.assert_allclose(again.module(torch.from_numpy(inputs)), expected, rtol=1e-4, atol=1e-5)
    assert again.save(again.module, tmp_path).read_bytes() == native.read_bytes()
    assert QuantizeTechnique().applies(step, again) == "The upload stores weights in 16 bits already."


def test_a_program_comes_back_narrow_and_is_taken_again(tmp_path: Path) -> None:
    module, inputs, spec = ConvNet().eval(), image(3), {"task": "image-classification"}
    content = exported(module, image())
    made = written(tmp_path / "job", "model.pt2", content, spec, Cast(), "native", "onnx")
    for tensor in module.state_dict().values():
        tensor.copy_(tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        expected = module(inputs)
    native = made["native"].path
    program = torch.export.load(native)
    floats = {name: tensor.dtype for name, tensor in program.state_dict.items() if tensor.is_floating_point()}
    assert set(floats.values()) == {torch.bfloat16}
    assert {"stem.weight", "block.1.running_var"} < floats.keys()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(inputs), expected, rtol=1e-5, atol=1e-6)
    proto = onnx.load(made["onnx"].path)
    bits = {layer.name: layer.bits for layer in graph_layers(proto, proto)}
    assert bits["block.0.weight"] == bits["head.weight"] == 16
    again = load_model(native, native.name, spec, tmp_path)
    assert {layer.type for layer in again.facts.layers} == {"Conv2d", "BatchNorm2d", "Linear"}
    assert again.stored["stem.weight"] == torch.bfloat16
    saved = torch.export.load(again.save(again.module, tmp_path))
    assert saved.state_dict["stem.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(again.module(inputs), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saved.module()(inputs), expected, rtol=1e-5, atol=1e-6)
    assert QuantizeTechnique().applies(Cast(), again) == "The upload stores weights in 16 bits already."


WORDS = 5000


class LargeTied(nn.Module):
    """A table that is most of the file, and the head, which is the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(ids).mean(1))
        return logits


def test_a_weight_that_a_program_has_twice_is_stored_once(tmp_path: Path) -> None:
    module, example = LargeTied().eval(), token_ids(vocabulary=WORDS)
    content, spec = exported(module, example), {"task": "image-classification"}
    made = written(tmp_path / "job", "model.pt2", content, spec, Cast(), "native")["native"].path
    state = torch.export.load(made).state_dict
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state["head.weight"].data_ptr() == state["table.weight"].data_ptr()
    assert len(content) - made.stat().st_size > 0.9 * 2 * module.table.weight.numel()
    again = load_model(made, made.name, spec, tmp_path)
    assert again.module.get_parameter("head.weight") is again.module.get_parameter("table.weight")
