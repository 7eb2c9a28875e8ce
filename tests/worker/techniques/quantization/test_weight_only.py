"""The step on real digits: every weight on its grid, masks held, GPTQ nearer to what the network gave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import DatasetMismatch
from app.contract.pruning import Prune
from app.contract.spec import Finetune
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, convnet, digits_data, mlp, tiny_model
from worker.constraints import baked, masks
from worker.context import Context
from worker.packed import packed
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.quantization.weight_only import group_of, sqnr
from worker.techniques.training.finetune import FinetuneTechnique


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    context = context_for(tiny_model(mlp()), digits_data(), tmp_path_factory.mktemp("trained"))
    FinetuneTechnique().apply(Finetune(training=Training(epochs=15, lr=2e-3)), context)
    return context.model.module


@pytest.fixture
def context(trained: nn.Module, tmp_path: Path) -> Context:
    return context_for(tiny_model(copy.deepcopy(trained)), digits_data(), tmp_path)


def quantize(context: Context, **fields: Any) -> Details:
    return QuantizeTechnique().apply(WeightOnly(**fields), context)


def rows_of(details: Details) -> list[dict[str, Any]]:
    rows = details["layers"]
    assert isinstance(rows, list)
    return rows  # type: ignore[return-value]


def values_of_groups(weight: Tensor, group: int) -> list[int]:
    """How many different values each run of so many inputs has."""
    return [len(run.unique()) for run in weight.flatten(1).reshape(-1, group)]


@pytest.mark.parametrize(
    ("algorithm", "symmetric"),
    [("rtn", True), ("rtn", False), ("hqq", False), ("awq", True), ("awq", False), ("gptq", True), ("awq+gptq", False)],
)
@pytest.mark.parametrize(("bits", "size"), [(8, None), (4, 32), (3, 16), (2, 16)])
def test_groups_have_as_many_values_as_bits_give(
    context: Context, bits: int, size: int | None, symmetric: bool, algorithm: str
) -> None:
    details = quantize(context, bits=bits, group_size=size, symmetric=symmetric, algorithm=algorithm)
    for row in rows_of(details):
        weight = context.model.module.get_parameter(str(row["name"]))
        group = int(row["group"])
        assert group == (size or weight.shape[1])
        assert max(values_of_groups(weight, group)) <= 2**bits
    assert details["layers_left_in_float"] == []


def agreement(context: Context) -> float:
    """Mean squared distance of the outputs from the upload's, on the test split."""
    assert context.feed is not None
    batch = next(iter(context.feed.batches("test", 447)))
    with torch.no_grad():
        difference = context.model.module(*batch.inputs) - context.teacher(*batch.inputs)
    return float(difference.square().mean())


@pytest.mark.parametrize(("bits", "most"), [(4, 0.75), (3, 0.75), (2, 0.75)])
def test_gptq_changes_outputs_less_than_the_nearest_values(
    context: Context, trained: nn.Module, bits: int, most: float
) -> None:
    other = context_for(tiny_model(copy.deepcopy(trained)), digits_data(), context.scratch)
    context.teacher = other.teacher = copy.deepcopy(trained).eval()
    quantize(context, bits=bits, group_size=32, algorithm="gptq")
    quantize(other, bits=bits, group_size=32, algorithm="rtn")
    assert agreement(context) < most * agreement(other)


def test_the_noise_is_what_the_report_says(context: Context) -> None:
    before = {name: weight.clone() for name, weight in context.model.module.named_parameters()}
    row = rows_of(quantize(context, bits=4, algorithm="rtn"))[0]
    one, other = (
        weights.detach().double().numpy()
        for weights in (before[row["name"]], context.model.module.get_parameter(row["name"]))
    )
    assert row["sqnr_db"] == pytest.approx(10 * np.log10((one**2).sum() / ((one - other) ** 2).sum()))
    assert sqnr(torch.ones(3), torch.ones(3)) is None


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "awq", "gptq"])
def test_what_was_pruned_stays_zero(context: Context, algorithm: str) -> None:
    PruneTechnique().apply(Prune(sparsity=0.7), context)
    quantize(context, bits=4, algorithm=algorithm)
    held = masks(context.model.module)
    module = baked(context.model.module)
    for name, mask in held.items():
        weight = module.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.signbit(weight[weight == 0]).any()


@pytest.mark.parametrize(("bits", "most"), [(8, 8.4), (4, 4.4), (2, 2.4)])
def test_the_packed_file_has_so_many_bits_a_weight(context: Context, bits: int, most: float) -> None:
    """And what steps take; the network is small, and steps are not."""
    details = quantize(context, bits=bits, group_size=32, algorithm="rtn")
    _, sizes = packed(context.model.module.state_dict())
    for row in rows_of(details):
        steps = 32 / row["group"]
        assert 8 * sizes.tensors[str(row["name"])] / row["weights"] < most + steps + 8 * 600 / row["weights"]


def test_convolutions_have_a_step_an_output(tmp_path: Path) -> None:
    context = context_for(tiny_model(convnet(), shape=(1, 8, 8)), digits_data((1, 8, 8)), tmp_path)
    details = quantize(context, bits=4)
    assert [row["group"] for row in rows_of(details)] == [9, 144, 32]
    weight = context.model.module.get_parameter("4.weight")
    assert max(values_of_groups(weight, 144)) <= 16


@pytest.mark.parametrize(("columns", "expected"), [(576, 64), (1536, 128), (100, 100), (48, 16), (128, 128)])
def test_a_group_divides_the_inputs(columns: int, expected: int) -> None:
    assert group_of(WeightOnly(), nn.Linear(columns, 4), columns) == expected


@pytest.mark.parametrize("algorithm", ["awq", "gptq"])
def test_without_data_is_refused(context: Context, algorithm: str) -> None:
    context.feed = None
    with pytest.raises(DatasetMismatch, match=f"{algorithm} looks at inputs: give a dataset"):
        quantize(context, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "awq", "gptq", "awq+gptq"])
def test_exporters_get_the_codes(context: Context, algorithm: str) -> None:
    quantize(context, bits=3, group_size=32, algorithm=algorithm)
    for name, grid in context.grids.items():
        weight = context.model.module.get_parameter(name).detach()
        codes, zeros = grid.unsigned(weight)
        assert int(codes.max()) <= 7
        shifted = codes.float().reshape(len(weight), -1, grid.group) - zeros.float()[..., None]
        found, rest = shifted * grid.step[..., None], grid.rest()
        if rest is None:
            assert torch.equal(found.view_as(weight), weight)
        else:
            assert algorithm == "hqq"
            torch.testing.assert_close((found + rest[..., None]).view_as(weight), weight, rtol=1e-5, atol=1e-6)


def test_awq_changes_outputs_less_than_the_nearest_values(trained: nn.Module, tmp_path: Path) -> None:
    """Channels of real digits differ: those along the border of a picture are nearly always zero."""
    found = {}
    for algorithm in ("rtn", "awq"):
        context = context_for(tiny_model(copy.deepcopy(trained)), digits_data(), tmp_path)
        details = quantize(context, bits=3, group_size=64, algorithm=algorithm)
        found[algorithm] = agreement(context)
    assert found["awq"] < 0.9 * found["rtn"]
    assert details["folds"] == 2  # between three layers, through ReLU
    assert details["layers_scaled"] == 2
    assert 0 < details["mean_exponent"] < 1  # type: ignore[operator]


def test_factors_and_then_gptq_where_channels_reach_far(trained: nn.Module, tmp_path: Path) -> None:
    """Some channels are made thirty times as large, and what reads them as much smaller: the network is the same."""
    outlying = copy.deepcopy(trained)
    with torch.no_grad():
        first, second = outlying.get_submodule("0"), outlying.get_submodule("2")
        for channel in range(0, 64, 8):
            first.weight[channel] *= 30  # type: ignore[index,operator,union-attr]
            first.bias[channel] *= 30  # type: ignore[index,operator,union-attr]
            second.weight[:, channel] /= 30  # type: ignore[index,operator,union-attr]
    found = {}
    for algorithm in ("awq", "gptq", "awq+gptq"):
        context = context_for(tiny_model(copy.deepcopy(outlying)), digits_data(), tmp_path)
        details = quantize(context, bits=3, group_size=64, algorithm=algorithm)
        found[algorithm] = agreement(context)
    assert found["awq+gptq"] < 0.9 * min(found["awq"], found["gptq"])
    assert (details["algorithm"], details["folds"]) == ("awq+gptq", 2)


def test_exclusions_stay_as_they_were(context: Context, trained: nn.Module) -> None:
    details = quantize(context, bits=2, exclude=("0",), algorithm="rtn")
    assert torch.equal(context.model.module.get_parameter("0.weight"), trained.get_parameter("0.weight"))
    assert [row["name"] for row in details["layers_left_in_float"]] == ["0.weight"]  # type: ignore[index,union-attr]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", "awq+gptq"])
def test_progress_goes_on_to_the_end(context: Context, algorithm: str) -> None:
    shares: list[float] = []
    context.progress = shares.append
    layers = rows_of(quantize(context, algorithm=algorithm))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) >= len(layers)
