"""Layers that hold codes: they give what their floats gave, as modules and as programs, and hold nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import ArtifactUnverified
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, digits_data, mlp, tiny_model
from tests.worker.techniques.quantization.test_onnx_bits import Tied, token_model
from worker.context import Context
from worker.evaluation.program import ProgramFile
from worker.export.registry import write_program
from worker.techniques.quantization.coded_layers import with_codes
from worker.techniques.quantization.quantize import QuantizeTechnique

WAYS = [("rtn", True), ("rtn", False), ("hqq", False)]


class Mixture(nn.Module):
    """Layers of every kind that the step is for, over [batch, 2, 6, 6]; its last is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pictures = nn.Conv2d(2, 5, 3)
        self.signals = nn.Conv1d(5, 7, 3)
        self.last = nn.Linear(14, 14)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.signals(torch.relu(self.pictures(inputs)).flatten(2))
        both: Tensor = self.last(torch.tanh(self.last(torch.relu(found).flatten(1)[:, :14])))
        return both


def quantized(context: Context, **fields: Any) -> Context:
    QuantizeTechnique().apply(WeightOnly(**{"group_size": 16} | fields), context)
    context.model.module.eval()
    return context


def program(context: Context, folder: Path) -> ProgramFile:
    made = write_program(context.model.module, context, folder)
    return ProgramFile(made.path, context.model.facts, 1, coded=made.coded)


@pytest.mark.parametrize(("algorithm", "symmetric"), WAYS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_kind_of_layer_gives_what_its_floats_gave(
    tmp_path: Path, bits: int, symmetric: bool, algorithm: str
) -> None:
    context = context_for(tiny_model(Mixture(), shape=(2, 6, 6)), None, tmp_path)
    quantized(context, bits=bits, symmetric=symmetric, algorithm=algorithm)
    before = copy.deepcopy(context.model.module.state_dict())
    twin, coded = with_codes(context.model.module, context.grids, {})
    assert set(coded) == {"pictures.weight", "signals.weight", "last.weight"}
    assert not any(name.endswith("weight") for name, _ in twin.named_parameters())
    inputs = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs), context.model.module(inputs), rtol=1e-6, atol=1e-6)
    for name, tensor in context.model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), "the module itself stays as it is"
    # And what is stored stands for the weights, read without the layers' own arithmetic.
    for name, own in coded.items():
        stored = own.read(name, twin.state_dict())
        weight = before[name].movedim(1, -1).flatten(1)
        torch.testing.assert_close(torch.from_numpy(stored.dequantized()), weight, rtol=1e-6, atol=1e-6)
        assert stored.few_bits == bits


@pytest.mark.parametrize(("bits", "share"), [(8, 8.0), (4, 4.0), (3, 3.0), (2, 2.0)])
def test_codes_take_their_bits(tmp_path: Path, bits: int, share: float) -> None:
    context = context_for(tiny_model(mlp()), digits_data(), tmp_path)
    quantized(context, bits=bits, algorithm="rtn", group_size=32)
    twin, coded = with_codes(context.model.module, context.grids, {})
    state = twin.state_dict()
    for name, own in coded.items():
        weight = context.model.module.get_parameter(name)
        assert 8 * state[f"{own.path}.codes"].numel() == share * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_program_holds_codes_and_gives_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    context = context_for(tiny_model(mlp()), digits_data(), tmp_path)
    context.model = replace(context.model, stored=dict.fromkeys(context.model.module.state_dict(), dtype))
    quantized(context, bits=4, algorithm="rtn", group_size=32)
    module = context.model.round_as_stored(context.model.module).eval()
    file = program(context, tmp_path)
    assert file.twins() == []
    layers = {layer.name: (layer.bits, layer.shape, round(layer.sparsity, 9)) for layer in file.layers()}
    wanted = {
        name: (4, tuple(weight.shape), round(1 - int(weight.count_nonzero()) / weight.numel(), 9))
        for name, weight in module.named_parameters()
        if weight.ndim == 2
    }
    assert layers == wanted
    count = sum(parameter.numel() for parameter in module.parameters())
    nonzero = sum(int(parameter.count_nonzero()) for parameter in module.parameters())
    assert file.parameters() == (count, nonzero)
    assert context.feed is not None
    inputs = next(iter(context.feed.batches("test", 100))).inputs
    with torch.no_grad():
        expected = module(*inputs).numpy()
    assert abs(file.outputs(inputs) - expected).max() < 1e-5 * abs(expected).max()
    assert "float32" not in {str(own.dtype) for own in file.program.state_dict.values() if own.ndim == 2} or (
        dtype == torch.float32
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tables_are_looked_up_in_codes_and_heads_share_them(tmp_path: Path, bits: int, tied: bool) -> None:
    context = context_for(token_model(Tied(tied).eval()), None, tmp_path)
    quantized(context, bits=4, embeddings=bits, algorithm="rtn")
    file = program(context, tmp_path)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = context.model.module(ids).numpy()
    assert abs(file.outputs((ids,)) - expected).max() < 1e-5
    rows = {layer.name: layer.bits for layer in file.layers()}
    assert rows == {"table.weight": bits, "inner.weight": 4} | ({} if tied else {"head.weight": 4})
    kinds = {str(node.target) for node in file.program.graph.nodes}
    assert "aten.embedding.default" in kinds
    bytes_of_codes = {50 * 64 * bits // 8, 64 * 64 // 2} | (set() if tied else {50 * 64 // 2})
    stored = {own.data_ptr(): own.nbytes for own in file.program.state_dict.values() if own.dtype == torch.uint8}
    assert bytes_of_codes <= set(stored.values())


def test_a_file_without_its_codes_is_refused(tmp_path: Path) -> None:
    context = context_for(tiny_model(mlp()), digits_data(), tmp_path)
    plain = write_program(context.model.module.eval(), context, tmp_path)
    quantized(context, bits=4, algorithm="rtn")
    _, coded = with_codes(context.model.module, context.grids, {})
    with pytest.raises(ArtifactUnverified, match=r"should store .* in few bits, and does not"):
        ProgramFile(plain.path, context.model.facts, 1, coded=coded)
