"""Jobs that deliver a folder of compressed-tensors: read again by transformers, as anybody would."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.contract.errors import ExportFailed, InvalidSpec, Unsupported
from app.contract.report import ArtifactReport, Report
from app.contract.spec import ExportFormat, Prune, Step
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, mlp, tiny_model
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.test_run import SHAPE
from worker.export.registry import write_compressed
from worker.loading import load_model
from worker.model import Model
from worker.request import RunRequest
from worker.run import run_job
from worker.techniques.quantization.weight_only import round_weights

pytestmark = pytest.mark.usefixtures("known_memory")

NAME = "model.compressed-tensors.zip"


def llama(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    module = LlamaForCausalLM(config).to(dtype)
    module.save_pretrained(folder)
    return module


def bert(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100, num_labels=3
    )
    module = BertForSequenceClassification(config).to(dtype)
    module.save_pretrained(folder)
    return module


def request(folder: Path, steps: tuple[Step, ...], export: tuple[ExportFormat, ...]) -> RunRequest:
    content = zipped({path.name: path.read_bytes() for path in (folder / "model").iterdir()})
    return request_for(folder / "job", "model.zip", content, {}, None, steps, export=export)


def done(request: RunRequest) -> tuple[Report, dict[str, ArtifactReport]]:
    report = run_job(request, Recorder()).report
    return report, {artifact.format: artifact for artifact in report.artifacts}


def unzipped(request: RunRequest, name: str) -> Path:
    target = request.scratch / name.removesuffix(".zip")
    with zipfile.ZipFile(request.output / name) as archive:
        archive.extractall(target)  # our own file
    return target


@pytest.mark.parametrize(
    ("bits", "group"), [(4, 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, None), (2, 32)))]
)
def test_transformers_loads_the_weights_of_the_native_file(tmp_path: Path, bits: Any, group: int | None) -> None:
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "model")
    step = WeightOnly(bits=bits, group_size=group, symmetric=True, algorithm="rtn")
    asked = request(tmp_path, (step,), ("native", "compressed-tensors"))
    report, artifacts = done(asked)
    plain = AutoModelForCausalLM.from_pretrained(unzipped(asked, "model.zip"))
    small = AutoModelForCausalLM.from_pretrained(unzipped(asked, NAME))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(small.get_submodule(name).weight, layer.weight)
    own, native = artifacts["compressed-tensors"].measurement, artifacts["native"].measurement
    assert own.runtime == "torch"
    assert (own.parameters, own.nonzero_parameters) == (native.parameters, native.nonzero_parameters)
    assert {layer.name: layer.bits for layer in own.layers if "proj" in layer.name} == {
        layer.name: bits for layer in native.layers if "proj" in layer.name
    }
    assert own.size_bytes < native.size_bytes
    assert any("model.zip holds weights of few bits as floats" in warning for warning in report.warnings)
    assert not any(NAME in warning and "as floats" in warning for warning in report.warnings)


def test_the_folder_says_what_is_in_it(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    step = WeightOnly(group_size=128, symmetric=True, algorithm="rtn", exclude=("model.layers.0.self_attn.q_proj",))
    asked = request(tmp_path, (step,), ("compressed-tensors",))
    done(asked)
    folder = unzipped(asked, NAME)
    config = json.loads((folder / "config.json").read_text())
    given = json.loads((tmp_path / "model" / "config.json").read_text())
    told = config.pop("quantization_config")
    assert config == given
    assert told["quant_method"] == "compressed-tensors"
    assert told["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    groups = [(own["targets"], own["weights"]["group_size"]) for own in told["config_groups"].values()]
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert groups == [(["Linear"], 32), (down, 128)]  # of 96 and of 256 inputs
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (96, 256 * 4 // 32)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (96, 2)
    assert "model.layers.0.mlp.down_proj.weight" not in tensors
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert "lm_head.weight" not in tensors  # it is the embedding's


def test_bits_a_layer_are_kinds_of_their_own(tmp_path: Path) -> None:
    """As method mixed leaves them: one group of the configuration for each number of bits, floats among them."""
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "model")
    zip_file = tmp_path / "upload.zip"
    zip_file.write_bytes(zipped({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}))
    context = context_for(load_model(zip_file, "upload.zip", {}, tmp_path), None, tmp_path)
    module = context.model.module
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and "proj" in name]
    bits = {f"{name}.weight": (8, 4, 2, None)[place % 4] for place, name in enumerate(names)}
    step = WeightOnly(symmetric=True, algorithm="rtn", group_size=32)
    given = {name: own for name, own in bits.items() if own is not None}
    round_weights(step, given, context, {})
    stored = write_compressed(module, context, tmp_path)
    assert stored.bits == given
    with zipfile.ZipFile(stored.path) as archive:
        archive.extractall(tmp_path / "small")  # our own file
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    kinds = [group["weights"]["num_bits"] for group in config["config_groups"].values()]
    assert sorted(kinds) == [2, 4, 8]
    assert len([name for name in config["ignore"] if "proj" in name]) == list(bits.values()).count(None)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        small(torch.arange(20).reshape(2, 10))
    for name in names:
        own = next(layer for other, layer in small.named_modules() if name.endswith(other) and other)
        assert torch.equal(own.weight, module.get_submodule(name).weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_halves_stay_halves(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(tmp_path / "model", dtype)
    step = WeightOnly(group_size=32, symmetric=True, algorithm="rtn")
    asked = request(tmp_path, (step,), ("native", "compressed-tensors", "onnx"))
    done(asked)
    plain = AutoModelForSequenceClassification.from_pretrained(unzipped(asked, "model.zip"))
    small = AutoModelForSequenceClassification.from_pretrained(unzipped(asked, NAME))
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        small(ids)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            assert small.get_submodule(name).weight.dtype == dtype
            assert torch.equal(small.get_submodule(name).weight, layer.weight)


@pytest.mark.slow
def test_weights_with_a_config_become_a_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "model", tied=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    steps = (WeightOnly(symmetric=True, algorithm="rtn"),)
    asked = request_for(
        tmp_path / "job", "model.safetensors", content, {"config": config}, None, steps, export=("compressed-tensors",)
    )
    done(asked)
    module = AutoModelForCausalLM.from_pretrained(unzipped(asked, NAME))
    with torch.no_grad():
        assert bool(module(torch.arange(10)[None]).logits.isfinite().all())


@pytest.mark.parametrize(
    ("fields", "pointer", "sentence"),
    [
        ({"symmetric": False}, "/steps/0/symmetric", "cannot load zero points"),
        ({"symmetric": True, "bits": 3}, "/steps/0/bits", "disagree"),
    ],
)
def test_what_readers_do_not_know_is_refused(tmp_path: Path, fields: Any, pointer: str, sentence: str) -> None:
    llama(tmp_path / "model")
    asked = request(tmp_path, (WeightOnly(algorithm="rtn", **fields),), ("compressed-tensors",))
    with pytest.raises(InvalidSpec, match=sentence) as refused:
        run_job(asked, Recorder())
    assert refused.value.pointer == pointer


def test_other_models_and_other_steps_are_refused(tmp_path: Path, trained_lenet: Model) -> None:
    steps = (WeightOnly(symmetric=True, algorithm="rtn"),)
    lenet = job(tmp_path, trained_lenet.module, LENET_LAYERS, SHAPE, None, steps, export=("compressed-tensors",))
    with pytest.raises(Unsupported, match="the model came as architecture") as refused:
        run_job(lenet, Recorder())
    assert refused.value.pointer == "/export"
    llama(tmp_path / "model")
    with pytest.raises(InvalidSpec, match="add a step quantize") as refused:
        run_job(request(tmp_path, (Prune(sparsity=0.5),), ("compressed-tensors",)), Recorder())
    assert refused.value.pointer == "/export"


def test_a_student_of_another_kind_is_refused(tmp_path: Path) -> None:
    context = context_for(tiny_model(mlp()), None, tmp_path)
    with pytest.raises(ExportFailed, match="the student is none"):
        write_compressed(context.model.module, context, tmp_path)
