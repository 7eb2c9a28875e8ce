"""The step on small networks: what is rounded and how, what is left, and that masks hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from app.contract.cast import Cast
from app.contract.codebook import Codebook
from app.contract.errors import InvalidSpec
from app.contract.pruning import Prune
from tests.worker.helpers import context_for, convnet, mlp, tiny_model
from tests.worker.nets import Recurrent, text_model
from worker.constraints import baked, masks
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.float8_math import LARGEST
from worker.techniques.quantization.quantize import QuantizeTechnique

NUMPY: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_for(tiny_model(mlp(norm=True).eval()), None, tmp_path)


def cast(context: Context, dtype: str, **fields: Any) -> Details:
    return QuantizeTechnique().apply(Cast.model_validate({"dtype": dtype, **fields}), context)


def rows_of(details: Details, name: str = "layers") -> list[dict[str, Any]]:
    rows = details[name]
    assert isinstance(rows, list)
    return rows  # type: ignore[return-value]


def delivered(context: Context) -> dict[str, torch.Tensor]:
    """The weights as every exporter gets them."""
    return context.model.round_as_stored(baked(context.model.module)).state_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float_is_rounded_as_numpy_rounds_it(context: Context, dtype: str) -> None:
    before = {name: tensor.clone() for name, tensor in context.model.module.state_dict().items()}
    details = cast(context, dtype)
    after = delivered(context)
    changed = 0
    for name, tensor in before.items():
        if tensor.is_floating_point():
            assert np.array_equal(after[name].numpy(), tensor.numpy().astype(NUMPY[dtype]).astype(np.float32))
            changed += int(not torch.equal(after[name], tensor))
    assert changed == 6  # weights and biases of three layers; BatchNorm has ones and zeros
    assert details["tensors_cast"] == sum(tensor.is_floating_point() for tensor in before.values())
    assert [(row["name"], row["bits"]) for row in rows_of(details)] == [
        ("0.weight", 16), ("3.weight", 16), ("5.weight", 16)
    ]  # fmt: skip
    one, other = before["0.weight"].double().numpy(), after["0.weight"].double().numpy()
    sqnr = 10 * np.log10((one**2).sum() / ((one - other) ** 2).sum())
    assert rows_of(details)[0]["sqnr_db"] == pytest.approx(sqnr)
    assert details["layers_left_in_float"] == []


def test_what_float16_cannot_hold_stays_and_is_listed(context: Context) -> None:
    module = context.model.module
    with torch.no_grad():
        module[0].weight[3, 4] = 70_000.0  # type: ignore[index]
        module[5].weight[0, 0] = float("nan")  # type: ignore[index]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    left = rows_of(cast(context, "float16"), "layers_left_in_float")
    assert [(row["name"], row["why"]) for row in left] == [
        ("0.weight", "beyond the range of the type"),
        ("5.weight", "not finite"),
    ]
    after = delivered(context)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])
    assert cast(context, "bfloat16")["tensors_cast"] == 9  # the range is that of float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_excluded_layers_stay_as_they_are(context: Context, dtype: str) -> None:
    before = {name: tensor.clone() for name, tensor in context.model.module.state_dict().items()}
    details = cast(context, dtype, exclude=["3"])
    after = delivered(context)
    assert torch.equal(after["3.weight"], before["3.weight"])
    assert torch.equal(after["3.bias"], before["3.bias"])
    assert not torch.equal(after["5.weight"], before["5.weight"])
    assert "3.weight" in [row["name"] for row in rows_of(details, "layers_left_in_float")]
    assert "3.weight" not in [row["name"] for row in rows_of(details)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3"])
def test_what_was_pruned_stays_zero(context: Context, dtype: str) -> None:
    PruneTechnique().apply(Prune(sparsity=0.7), context)
    cast(context, dtype)
    after = delivered(context)
    for name, mask in masks(context.model.module).items():
        assert not after[name][~mask].any()
        assert not torch.signbit(after[name][~mask]).any()
        assert after[name][mask].count_nonzero() > 0.95 * mask.count_nonzero()


def test_float8_has_a_scale_an_output(tmp_path: Path) -> None:
    module = convnet()
    turned = nn.Sequential(*module[:3], nn.ConvTranspose2d(8, 6, 3), nn.Flatten())
    context = context_for(tiny_model(turned, shape=(1, 8, 8)), None, tmp_path)
    before = {name: tensor.clone() for name, tensor in turned.state_dict().items()}
    details = cast(context, "float8_e4m3")
    assert [row["bits"] for row in rows_of(details)] == [8] * len(rows_of(details))
    for row in rows_of(details):
        name = str(row["name"])
        axis = 1 if isinstance(turned.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d) else 0
        weight = np.moveaxis(before[name].numpy(), axis, 0)
        found = np.moveaxis(delivered(context)[name].numpy(), axis, 0)
        assert context.scales[name].numel() == len(weight)
        for own, other in zip(weight, found, strict=True):
            scale = np.abs(own).max() / np.float32(LARGEST)
            expected = (own / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
            np.testing.assert_array_equal(other, expected)
        assert 25 < row["sqnr_db"] < 40
    biases = [name for name in before if name.endswith("bias")]
    assert all(torch.equal(delivered(context)[name], before[name]) for name in biases)


def test_float8_is_not_for_tables_and_recurrences(tmp_path: Path) -> None:
    model = text_model(Recurrent(nn.LSTM), classes=4)
    details = cast(context_for(model, None, tmp_path), "float8_e4m3")
    assert len(rows_of(details)) == 1
    left = rows_of(details, "layers_left_in_float")
    assert {row["why"] for row in left} == {"no weight of a product"}
    table = tiny_model(nn.Sequential(nn.Embedding(9, 4), nn.Flatten()))
    reason = QuantizeTechnique().applies(Cast(dtype="float8_e4m3"), table)
    assert reason is not None
    assert "there are none" in reason
    assert QuantizeTechnique().applies(Cast(), table) is None


def test_float8_leaves_codebooks_and_what_is_not_finite(context: Context) -> None:
    QuantizeTechnique().apply(Codebook(entries=16, exclude=("3", "5")), context)
    with torch.no_grad():
        context.model.module[5].weight[0, 0] = float("inf")  # type: ignore[index]
    before = delivered(context)["0.weight"].clone()
    details = cast(context, "float8_e4m3")
    reasons = {row["name"]: row["why"] for row in rows_of(details, "layers_left_in_float")}
    assert reasons == {"0.weight": "has a codebook", "5.weight": "not finite"}
    assert torch.equal(delivered(context)["0.weight"], before)


def test_an_exclusion_of_all_is_refused() -> None:
    reason = QuantizeTechnique().applies(Cast(exclude=("*",)), tiny_model(mlp()))
    assert reason == "exclude leaves no weight to cast."


def test_a_pattern_that_excludes_nothing_is_refused() -> None:
    """As the name of what only holds layers does."""
    model = tiny_model(nn.Sequential(nn.Sequential(nn.Linear(64, 10))))
    with pytest.raises(InvalidSpec, match=r"'0' matches no layer that has weights.*The layers are 0\.0; '0\.\*'"):
        QuantizeTechnique().applies(Cast(exclude=("0",)), model)
    assert QuantizeTechnique().applies(Cast(exclude=("0.*",)), model) == "exclude leaves no weight to cast."
    assert QuantizeTechnique().applies(Cast(exclude=("0.0.bias",)), model) is None


class Tied(nn.Module):
    """A table, a layer, and a head that is the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(self.table(ids)).mean(1))
        return out


@pytest.mark.parametrize("name", ["table", "head", "head.weight"])
def test_a_shared_weight_is_excluded_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    context = context_for(text_model(Tied(), classes=10), None, tmp_path)
    before = context.model.module.get_parameter("table.weight").detach().clone()
    details = cast(context, "bfloat16", exclude=[name])
    left = rows_of(details, "layers_left_in_float")
    assert [(row["name"], row["why"]) for row in left] == [("table.weight", "excluded")]
    assert set(context.model.casts) == {"inner.weight", "inner.bias"}
    for own in ("table.weight", "head.weight"):
        assert torch.equal(delivered(context)[own], before)


def test_a_shared_weight_is_cast_under_all_of_its_names(tmp_path: Path) -> None:
    context = context_for(text_model(Tied(), classes=10), None, tmp_path)
    details = cast(context, "bfloat16")
    assert [row["name"] for row in rows_of(details)] == ["table.weight", "inner.weight"]
    assert {"table.weight", "head.weight"} < set(context.model.casts)


def test_float8_says_that_a_head_is_an_embedding(tmp_path: Path) -> None:
    details = cast(context_for(text_model(Tied(), classes=10), None, tmp_path), "float8_e4m3")
    assert [row["name"] for row in rows_of(details)] == ["inner.weight"]
    left = rows_of(details, "layers_left_in_float")
    assert [(row["name"], row["why"]) for row in left] == [("table.weight", "shared with an embedding")]


def test_float8_of_an_upload_in_float64_keeps_rows_of_zeros(context: Context) -> None:
    with torch.no_grad():
        context.model.module[0].weight[3] = 0.0  # type: ignore[index]
    context.model = replace(context.model, stored={"0.weight": torch.float64})
    details = cast(context, "float8_e4m3")
    assert details["layers_left_in_float"] == []
    assert not delivered(context)["0.weight"][3].any()
