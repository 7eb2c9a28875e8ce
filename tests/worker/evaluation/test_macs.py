from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from app.contract.facts import TensorFacts
from tests.worker.conftest import OnnxExport
from tests.worker.loading.onnx_files import noise, one_node
from tests.worker.loading.test_onnx_direct import branching
from tests.worker.nets import LENET_MACS, model_of, resnet18
from worker.evaluation.macs import module_macs
from worker.evaluation.onnx_macs import graph_macs
from worker.export.onnx import export_onnx
from worker.model import Model


def onnx_macs(model: Model, path: Path) -> int:
    feed = {facts.name: t.numpy() for facts, t in zip(model.facts.inputs, model.example(), strict=True)}
    return graph_macs(onnx.load(path), feed)


def test_lenet_by_hand(trained_lenet: Model, lenet_float: Path, lenet_int8: Path) -> None:
    assert module_macs(trained_lenet.module, trained_lenet.example()) == LENET_MACS
    assert onnx_macs(trained_lenet, lenet_float) == LENET_MACS
    assert onnx_macs(trained_lenet, lenet_int8) == LENET_MACS


def test_resnet18_is_1_8_giga() -> None:
    """1.814 G: fvcore's count for torchvision's resnet18 at 224x224."""
    assert module_macs(resnet18(), (torch.zeros(1, 3, 224, 224),)) == pytest.approx(1.814e9, rel=1e-3)


def test_bert_by_formula(zoo: Callable[[str], OnnxExport]) -> None:
    """A layer: 4 h^2 + 2 h f a token for the projections, 2 n h for scores and values; then pooler and classifier."""
    hidden, layers, inner, length = 32, 2, 64, 32
    exported = zoo("bert")
    per_token = 4 * hidden**2 + 2 * hidden * inner + 2 * length * hidden
    expected = layers * length * per_token + hidden**2 + 3 * hidden
    assert module_macs(exported.model.module, exported.model.example()) == expected
    assert onnx_macs(exported.model, exported.path) == expected


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_recurrent_layers_by_formula(name: str, gates: int, zoo: Callable[[str], OnnxExport]) -> None:
    exported = zoo(name)
    expected = 32 * gates * 24 * (16 + 24) + 24 * 4
    assert module_macs(exported.model.module, exported.model.example()) == expected
    assert onnx_macs(exported.model, exported.path) == expected


def test_encoder_layer_and_transposed_convolution(tmp_path: Path) -> None:
    """Grouped and transposed convolutions by hand, then an encoder layer of width 16 over 4 steps."""
    module = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2),  # 10 positions x 8 x (4/2) x 3
        nn.ConvTranspose1d(8, 4, 2, stride=2, groups=4),  # 10 positions x 8 inputs x (4/4) x 2
        nn.Flatten(),
        nn.Linear(80, 64),
        nn.Unflatten(1, (4, 16)),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    )
    by_hand = 480 + 160 + 80 * 64 + 4 * (4 * 16 * 16 + 2 * 4 * 16 + 2 * 16 * 32)
    model = model_of(module, TensorFacts(name="input", shape=(4, 12), dtype="float32"), classes=16)
    assert module_macs(module, model.example()) == by_hand
    assert onnx_macs(model, export_onnx(module, model, tmp_path / "model.onnx")) == by_hand


def test_attention_as_one_operator_by_hand() -> None:
    """Two heads of 5 steps and width 4, and four heads of queries that share two of keys and values."""
    heads = noise(1, 2, 5, 4), noise(1, 2, 5, 4), noise(1, 2, 5, 4)
    proto = one_node("Attention", 23, heads)
    assert graph_macs(proto, {f"x{i}": one for i, one in enumerate(heads)}) == 2 * 5 * 5 * (4 + 4)
    flat = noise(1, 5, 8), noise(1, 5, 4), noise(1, 5, 4)
    proto = one_node("Attention", 23, flat, q_num_heads=4, kv_num_heads=2)
    assert graph_macs(proto, {f"x{i}": one for i, one in enumerate(flat)}) == 4 * 5 * 5 * (2 + 2)


def test_what_runs_in_a_branch_is_counted_and_what_does_not_run_is_not() -> None:
    x = noise(1, 4)
    assert graph_macs(branching(), {"x": x}) == 4 * 3 + 3 * 2
