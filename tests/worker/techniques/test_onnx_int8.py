from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from app.contract.calibration import Calibration
from app.contract.errors import ExportFailed
from app.contract.spec import Quantize
from tests.worker.conftest import OnnxExport
from tests.worker.helpers import mlp, tiny_model
from tests.worker.nets import IDS, MASK, Positional, model_of
from worker.data.base import Data
from worker.data.batch import Inputs
from worker.data.feed import Batch, Feed
from worker.evaluation.layers import graph_layers, graph_parameters
from worker.export.onnx import export_onnx
from worker.model import Model
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.onnx_int8 import activation_type, layer_of, quantize_file
from worker.techniques.quantization.quantize import QuantizeTechnique, excluded
from worker.techniques.quantization.stored import base_name, check_stored, stored_weights


def runs(path: Path, *names: str) -> Callable[[Inputs], np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})[0]


def examples(model: Model, batches: int = 2) -> Samples:
    made = [Batch(model.example(8, seed=seed), None) for seed in range(batches)]
    return Samples(lambda: made, [facts.name for facts in model.facts.inputs], batches)


def types(path: Path) -> dict[str, str]:
    return {weight.name: weight.values.dtype.name for weight in stored_weights(onnx.load(path))}


def test_lenet_within_a_point_and_near_a_quarter(
    trained_lenet: Model, lenet_float: Path, lenet_int8: Path, mnist: Data
) -> None:
    feed = Feed(trained_lenet, mnist)
    exact, samples = feed.score(runs(lenet_float, "input"), "test")
    quantized, _ = feed.score(runs(lenet_int8, "input"), "test")
    assert samples == 1000
    assert exact > 0.9
    assert abs(exact - quantized) <= 0.01
    assert lenet_int8.stat().st_size < 0.3 * lenet_float.stat().st_size


def test_weights_are_symmetric_int8_a_scale_a_channel_and_cannot_saturate(lenet_int8: Path) -> None:
    for weight in stored_weights(onnx.load(lenet_int8)):
        assert weight.values.dtype == np.int8
        assert weight.scale is not None
        assert weight.zero_point is not None
        assert weight.scale.shape[0] == weight.values.shape[0]
        assert not weight.zero_point.any()
        assert 2 * 255 * int(np.abs(weight.values.astype(int)).max()) < 2**15


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_calibration_method(
    method: str, trained_lenet: Model, lenet_float: Path, mnist: Data, tmp_path: Path
) -> None:
    feed = Feed(trained_lenet, mnist)
    samples = Samples(lambda: feed.batches("calibration", 16, limit=40), ["input"], 3)
    step = Quantize.model_validate({"method": "static", "calibration": {"method": method, "samples": 40}})
    quantize_file(lenet_float, tmp_path / "q.onnx", step, samples, ())
    share, _ = feed.score(runs(tmp_path / "q.onnx", "input"), "validation")
    assert share > 0.9


def test_pruned_zeros_stay_zeros_and_sparsity_survives(tmp_path: Path) -> None:
    model = tiny_model(mlp())
    kept = {}
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if weight.ndim == 2:
                weight[weight.abs() < weight.abs().quantile(0.8)] = 0.0
                kept[name] = (weight != 0).numpy()
    path = export_onnx(model.module, model, tmp_path / "float.onnx")
    for step in (Quantize(method="static"), Quantize(method="static", per_channel=False), Quantize(method="dynamic")):
        target = tmp_path / "int8.onnx"
        quantize_file(path, target, step, examples(model), ())
        stored = {weight.name: weight for weight in stored_weights(onnx.load(target))}
        assert set(stored) == set(kept)
        for name, weight in stored.items():
            nonzero = weight.dequantized() != 0
            nonzero = nonzero if nonzero.shape == kept[name].shape else nonzero.T
            assert not (nonzero & ~kept[name]).any(), "a pruned weight came back"
            assert weight.zeros() >= (~kept[name]).sum()


def test_dynamic_leaves_convolutions_alone(
    lenet_float: Path, trained_lenet: Model, mnist: Data, tmp_path: Path
) -> None:
    target = tmp_path / "dynamic.onnx"
    quantize_file(lenet_float, target, Quantize(method="dynamic"), None, ())
    operators = [node.op_type for node in onnx.load(target).graph.node]
    assert operators.count("Conv") == 2
    assert operators.count("MatMulInteger") == 3
    assert "ConvInteger" not in operators
    share, _ = Feed(trained_lenet, mnist).score(runs(target, "input"), "test")
    exact, _ = Feed(trained_lenet, mnist).score(runs(lenet_float, "input"), "test")
    assert abs(share - exact) <= 0.01


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_excluded_layers_stay_float(method: str, lenet_float: Path, trained_lenet: Model, tmp_path: Path) -> None:
    step = Quantize.model_validate({"method": method})
    quantize_file(lenet_float, tmp_path / "q.onnx", step, examples(trained_lenet), ("11", "0"))
    found = types(tmp_path / "q.onnx")
    assert (found["0.weight"], found["11.weight"]) == ("float32", "float32")
    assert (found["7.weight"], found["9.weight"]) == ("int8", "int8")


def test_int8_activations_where_asked(lenet_float: Path, trained_lenet: Model, tmp_path: Path) -> None:
    quantize_file(lenet_float, tmp_path / "q.onnx", Quantize(activations="int8"), examples(trained_lenet), ())
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert arrays["input_zero_point"].dtype == np.int8
    assert arrays["7.weight_quantized"].max() == 127 or arrays["7.weight_quantized"].min() == -127
    assert activation_type("uint8") == "uint8"


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_transformer_projections_become_int8(
    method: str, zoo: Callable[[str], OnnxExport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = zoo("bert")
    step = Quantize.model_validate({"method": method})
    torch.manual_seed(0)
    batches = [Batch((torch.randint(0, 100, (8, 20)), torch.ones(8, 20, dtype=torch.int64)), None) for _ in range(4)]
    samples = Samples(lambda: batches, ["input_ids", "attention_mask"], len(batches))
    quantize_file(exported.path, tmp_path / "q.onnx", step, samples, ())
    assert [path.name for path in tmp_path.iterdir()] == ["q.onnx"], "the quantizer left files behind"
    found = types(tmp_path / "q.onnx")
    projections = {name: dtype for name, dtype in found.items() if "encoder" in name or "classifier" in name}
    assert len(projections) == 13
    assert set(projections.values()) == {"int8"}
    embedding = found["inner.bert.embeddings.word_embeddings.weight"]
    assert embedding == "uint8"
    ids, mask = torch.randint(0, 100, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    got = runs(tmp_path / "q.onnx", "input_ids", "attention_mask")((ids, mask))
    with torch.no_grad():
        wanted = exported.model.module(ids, mask).numpy()
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


class Energies(torch.nn.Module):
    """A spectrogram of a kind: the energies of a convolution, pooled and rooted, then a second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = torch.nn.Conv1d(1, 8, 16, stride=8, bias=False)
        self.pool = torch.nn.LPPool2d(2.0, (2, 1))
        self.conv = torch.nn.Conv1d(4, 6, 3)
        self.norm = torch.nn.MaxPool1d(2)

    def forward(self, sound: Tensor) -> Tensor:
        energy: Tensor = self.pool(self.basis(sound)[:, None])[:, 0]
        return self.norm(self.conv(energy)).flatten(1)


def test_what_lies_among_floats_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(Energies(), shape=(1, 128), classes=36)
    source = export_onnx(model.module, model, tmp_path / "float.onnx")
    loud = torch.logspace(-3, 3, 64)[:, None, None]  # from silence to noise, as sound is
    batches = [Batch((torch.randn(64, 1, 128) * loud,), None) for _ in range(4)]
    quantize_file(source, tmp_path / "q.onnx", Quantize(), Samples(lambda: batches, ["input"], 4), ())
    graph = onnx.load(tmp_path / "q.onnx").graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    reads = {node.op_type: made.get(node.input[0]) for node in graph.node if "Pool" in node.op_type}
    assert reads["AveragePool"] == "Pow"  # between a power and a root
    assert reads["MaxPool"] == "DequantizeLinear"  # behind a convolution
    assert types(tmp_path / "q.onnx") == {"basis.weight": "int8", "conv.weight": "int8"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_dynamic_embedding_is_int8_unless_another_layer_has_it_too(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,  # the exporter folds the transpose of a smaller matrix and stores both
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    module = Positional(LlamaForCausalLM(config).eval(), "input_ids", "attention_mask")
    model = model_of(module, IDS, MASK, classes=2000)
    source = export_onnx(model.module, model, tmp_path / "float.onnx")
    quantize_file(source, tmp_path / "q.onnx", Quantize(method="dynamic"), None, ())
    layers = {layer.name: layer for layer in graph_layers(onnx.load(tmp_path / "q.onnx"), onnx.load(source))}
    embedding = layers["inner.lm_head.weight" if tied else "inner.model.embed_tokens.weight"]
    assert embedding.bits == (32 if tied else 8)
    assert layers["inner.model.layers.0.mlp.up_proj.weight"].bits == 8
    assert tied or (embedding.sqnr_db or 0) > 25  # 7 bits
    assert graph_parameters(onnx.load(tmp_path / "q.onnx"))[0] == graph_parameters(onnx.load(source))[0]
    ids = torch.randint(0, 2000, (2, 9))
    got = runs(tmp_path / "q.onnx", "input_ids", "attention_mask")((ids, torch.ones_like(ids)))
    with torch.no_grad():
        wanted = model.module(ids, torch.ones_like(ids)).numpy()
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


def test_recurrent_weights_stay_float(zoo: Callable[[str], OnnxExport], tmp_path: Path) -> None:
    exported = zoo("lstm")
    quantize_file(exported.path, tmp_path / "q.onnx", Quantize(), examples(exported.model), ())
    found = types(tmp_path / "q.onnx")
    assert found["rnn.weight_ih_l0"] == "float32"
    assert (found["emb.weight"], found["fc.weight"]) == ("uint8", "int8")


def test_a_float_copy_beside_the_integers_is_refused(lenet_float: Path, lenet_int8: Path) -> None:
    source, quantized = onnx.load(lenet_float), onnx.load(lenet_int8)
    check_stored(source, quantized, ("Conv", "Gemm"), ())
    doubled = copy.deepcopy(quantized)
    doubled.graph.initializer.append(next(t for t in source.graph.initializer if t.name == "7.weight"))
    with pytest.raises(ExportFailed, match=r"7\.weight would be stored twice"):
        check_stored(source, doubled, ("Conv", "Gemm"), ())
    with pytest.raises(ExportFailed, match="should be stored as int8 and is not"):
        check_stored(source, source, ("Conv", "Gemm"), ())


def test_samples_can_be_gone_through_again() -> None:
    made = [Batch((torch.full((2, 3), float(i)),), None) for i in range(3)]
    samples = Samples(lambda: iter(made), ["x"], 3)
    assert len(samples) == 3
    for _ in range(2):
        assert [float(feed["x"][0, 0]) for feed in samples] == [0, 1, 2]


def test_layers_are_named_as_in_the_facts() -> None:
    assert layer_of("0.weight") == "0"
    assert layer_of("0.self_attn.in_proj_weight") == "0.self_attn.in_proj_weight"


@pytest.mark.parametrize(
    ("layer", "pattern", "is_excluded"),
    [
        ("7", "7", True),
        ("7", "7.weight", True),
        ("1.self_attn.in_proj_weight", "1.self_attn", True),
        ("1.self_attn.in_proj_weight", "1.self_attn.in_proj_weight", True),
        ("encoder.query", "encoder", False),
        ("encoder.query", "encoder*", True),
        ("17", "7", False),
    ],
)
def test_patterns_name_layers_or_weights(layer: str, pattern: str, is_excluded: bool) -> None:
    assert excluded(layer, Quantize(exclude=(pattern,))) is is_excluded


def test_base_name() -> None:
    assert base_name("fc.weight_Transposed_quantized") == "fc.weight"
    assert base_name("fc.weight") == "fc.weight"


def test_technique_says_why_it_does_not_apply(trained_lenet: Model) -> None:
    technique = QuantizeTechnique()
    convolutions = tiny_model(torch.nn.Sequential(torch.nn.Conv2d(1, 10, 8), torch.nn.Flatten()), shape=(1, 8, 8))
    assert technique.applies(Quantize(method="static"), convolutions) is None
    reason = technique.applies(Quantize(method="dynamic"), convolutions)
    assert reason is not None
    assert "never quantized dynamically" in reason
    assert "no Linear" in (technique.applies(Quantize(), tiny_model(torch.nn.Sequential(torch.nn.ReLU()))) or "")
    assert "no layer to quantize" in (technique.applies(Quantize(exclude=("*",)), trained_lenet) or "")
    assert technique.applies(Quantize(exclude=("0",), calibration=Calibration(samples=1)), trained_lenet) is None
