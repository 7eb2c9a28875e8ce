"""Bits a layer on real digits: what is measured, what is chosen, and what limits hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import DatasetMismatch, InvalidSpec
from app.contract.mixed import Mixed
from app.contract.pruning import Prune
from tests.worker.helpers import context_for, convnet, digits_data, memory_data, part_of, tiny_model
from worker.constraints import baked, masks
from worker.context import Context
from worker.export.registry import write_onnx
from worker.objectives.values import Regression
from worker.packed import packed
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization import mixed
from worker.techniques.quantization.mixed import applies, layers_of
from worker.techniques.quantization.mixed_math import Costs
from worker.techniques.quantization.quantize import QuantizeTechnique

Rows = list[dict[str, Any]]


def quantize(context: Context, **fields: Any) -> Details:
    return QuantizeTechnique().apply(Mixed.model_validate(fields), context)


def rows_of(details: Details, name: str = "layers") -> Rows:
    rows = details[name]
    assert isinstance(rows, list)
    return rows


def bits_of(details: Details) -> dict[str, int]:
    return {row["name"]: row["bits"] for row in rows_of(details)}


def accuracy(context: Context, split: str = "validation") -> float:
    assert context.feed is not None
    module = baked(context.model.module).eval()
    return context.feed.score(lambda inputs: module(*inputs), split)[0]


def to_nearest(weight: Tensor, bits: int) -> Tensor:
    """One symmetric step a row, the best of those that cover 100 to 40 % of its range, by trying."""
    high = 2 ** (bits - 1) - 1
    rows = []
    for row in weight:
        steps = [share * float(row.abs().max()) / (high + 0.5) for share in torch.linspace(1, 0.4, 40).tolist()]
        tried = [(row / step).round().clamp(-high - 1, high) * step for step in steps]
        rows.append(min(tried, key=lambda own: float((own - row).square().sum())))
    return torch.stack(rows)


def test_sensitivities_of_a_linear_network_by_hand(tmp_path: Path) -> None:
    """Of y = B A x the outputs move by B (A' - A) x, or by (B' - B) A x: nothing else lies between."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).eval()
    first, second = (layer.weight.detach().clone() for layer in module)
    inputs = torch.randn(40, 6)
    model = tiny_model(module, shape=(6,), classes=3)
    model = type(model)(module, model.facts, model.encode, model.save, Regression())
    context = context_for(model, memory_data({"calibration": (inputs, None)}), tmp_path)
    found = rows_of(quantize(context, max_size=0.6, symmetric=True, algorithm="rtn", group_size=None, floats=False))
    for bits in (8, 4, 3, 2):
        moved = [
            inputs @ (to_nearest(first, bits) - first).T @ second.T,
            inputs @ first.T @ (to_nearest(second, bits) - second).T,
        ]
        for row, own in zip(found, moved, strict=True):
            assert row[f"sensitivity_{bits}"] == pytest.approx(float(own.square().mean()), rel=1e-3)


def test_a_layer_that_minds_more_gets_more_bits(context: Context) -> None:
    """A few weights of the second layer reach far, and those of the next make up for it: the network is the same, and
    a step that the large ones share is too coarse for the others."""
    module = context.model.module
    assert isinstance(module, nn.Sequential)
    before, expected = bits_of(quantize(_copied(context), max_size=0.13)), accuracy(context)
    with torch.no_grad():
        module[2].weight[:, ::8] *= 30.0
        module[0].weight[::8] /= 30.0
        module[0].bias[::8] /= 30.0
    assert accuracy(context) == pytest.approx(expected, abs=0.005)
    context.teacher = copy.deepcopy(module)
    uniform = _copied(context)
    found = quantize(context, max_size=0.16, symmetric=True, algorithm="rtn")
    bits = bits_of(found)
    assert bits["2.weight"] > before["2.weight"]
    assert bits["2.weight"] > bits["0.weight"]
    row = next(row for row in rows_of(found) if row["name"] == "2.weight")
    assert row["sensitivity_4"] > 10 * row["sensitivity_8"]
    quantize(uniform, max_size=0.16, symmetric=True, algorithm="rtn", bits=[4], floats=False)
    assert accuracy(context) > accuracy(uniform) + 0.02


def _copied(context: Context) -> Context:
    assert context.feed is not None
    return context_for(tiny_model(copy.deepcopy(context.model.module)), context.feed.data, context.scratch)


def test_a_layer_stays_a_float_where_that_is_worth_most(context: Context) -> None:
    details = quantize(context, max_size=0.4, bits=[2], algorithm="rtn")
    left = rows_of(details, "layers_left_in_float")
    assert {row["name"] for row in left} & {"2.weight", "4.weight"}
    assert all("better spent here" in row["why"] and row["sensitivity_2"] > 0 for row in left)
    assert not {row["name"] for row in left} & set(context.grids)
    alone = quantize(_copied(context), max_size=0.4, bits=[2], algorithm="rtn", floats=False)
    assert alone["layers_left_in_float"] == []


@pytest.mark.parametrize("size", [0.11, 0.145])
def test_what_is_chosen_is_no_worse_than_equal_bits(context: Context, size: float) -> None:
    """By how far the outputs of the whole move, which is measured on the same samples."""
    assert context.feed is not None
    details = quantize(context, max_size=size)
    chosen, alike = rows_of(details, "searched")
    assert (chosen["alike"], alike["alike"]) == (0, 1)
    best = min(chosen, alike, key=lambda row: row["divergence"])
    assert details["bytes"] == best["bytes"] <= size * 25_856
    (batch,) = context.feed.batches("calibration", 100)
    with torch.no_grad():
        mine, usual = context.model.module(*batch.inputs), context.teacher(*batch.inputs)
    apart = nn.functional.kl_div(mine.log_softmax(1), usual.softmax(1), reduction="batchmean")
    assert best["divergence"] == pytest.approx(float(apart), rel=1e-3)


@pytest.mark.parametrize("size", [0.09, 0.11, 0.13, 0.2, 0.25, 0.5])
def test_bytes_keep_to_the_limit_and_are_those_of_the_layers(context: Context, size: float) -> None:
    details = quantize(context, max_size=size, algorithm="rtn")
    floats = 4 * (64 * 64 + 64 * 32 + 32 * 10)
    counted = sum(4 * row["weights"] for row in rows_of(details, "layers_left_in_float"))
    for row in rows_of(details):
        groups = row["weights"] // row["group"]
        counted += row["weights"] * row["bits"] // 8 + 4 * groups + -(-groups * row["bits"] // 8)
    assert details["bytes_as_floats"] == floats
    assert details["bytes"] == counted <= size * floats
    assert details["size"] == counted / floats


def test_the_onnx_file_has_just_these_bytes(context: Context, tmp_path: Path) -> None:
    """In blocks of 32 inputs that operators of the runtime know, and without 3 bits, which they store in 4."""
    details = quantize(context, max_size=0.17, bits=[8, 4, 2], group_size=32, algorithm="rtn")
    assert len(set(bits_of(details).values())) > 1
    proto = onnx.load(write_onnx(context.model.module.eval(), context, tmp_path).path)
    parts = ("_quantized", "_scale", "_zero_point", "weight")
    held = [one for one in proto.graph.initializer if one.name.endswith(parts)]
    assert sum(len(one.raw_data) for one in held) == details["bytes"]
    ways = [attribute.i for node in proto.graph.node for attribute in node.attribute if attribute.name == "bits"]
    assert sorted(ways) == sorted(bits_of(details).values())


@pytest.mark.parametrize("size", [0.1, 0.15, 0.2])
def test_the_packed_file_keeps_to_the_limit(context: Context, size: float) -> None:
    """A name, a shape and a table of the codes are its header, which small tensors of 8 bits feel most."""
    details = quantize(context, max_size=size, symmetric=True, algorithm="gptq")
    _, sizes = packed(baked(context.model.module).state_dict())
    names = [row["name"] for row in rows_of(details)]
    slack = 100 * len(names) + sum(2 * 2 ** row["bits"] for row in rows_of(details) if row["bits"] == 8)
    taken = sum(sizes.tensors[name] for name in names)
    floats = sum(4 * row["weights"] for row in rows_of(details, "layers_left_in_float"))
    assert taken + floats <= details["bytes"] + slack  # type: ignore[operator]


@pytest.mark.parametrize("algorithm", ["rtn", "awq", "gptq"])
def test_what_was_pruned_stays_zero(context: Context, algorithm: str) -> None:
    PruneTechnique().apply(Prune(sparsity=0.6), context)
    quantize(context, max_accuracy_drop=0.02, algorithm=algorithm)
    held = masks(context.model.module)
    module = baked(context.model.module)
    assert held
    for name, mask in held.items():
        assert not module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_the_fewest_bytes_that_hold_the_metric(context: Context, algorithm: str) -> None:
    before = accuracy(context)
    details = quantize(context, max_accuracy_drop=0.02, algorithm=algorithm)
    assert details["held"]
    assert details["wanted_validation_metric"] == pytest.approx(before - 0.02)
    assert details["validation_metric"] == pytest.approx(accuracy(context))
    assert accuracy(context) >= before - 0.02
    tried = rows_of(details, "searched")
    smaller = [row for row in tried if row["bytes"] < details["bytes"]]
    assert smaller
    assert not any(row["holds"] for row in smaller)
    assert any(row["bytes"] == details["bytes"] and row["holds"] for row in tried)
    assert float(details["size"]) < 0.25  # type: ignore[arg-type]


def test_where_nothing_holds_floats_are_left(context: Context) -> None:
    before = {name: weight.clone() for name, weight in context.model.module.named_parameters()}
    with torch.no_grad():  # an upload that was better than what an earlier step made of it
        context.model.module.get_parameter("4.weight").zero_()
    details = quantize(context, max_accuracy_drop=0.0, algorithm="rtn")
    assert not details["held"]
    assert details["layers"] == []
    assert {row["why"] for row in rows_of(details, "layers_left_in_float")} == {"no bits held the metric"}
    assert torch.equal(context.model.module.get_parameter("0.weight"), before["0.weight"])
    assert context.grids == {}
    assert details["size"] == 1.0


def test_excluded_layers_and_embeddings_say_why(tmp_path: Path) -> None:
    context = context_for(tiny_model(convnet().eval(), shape=(1, 8, 8)), digits_data((1, 8, 8)), tmp_path)
    details = quantize(context, max_size=0.3, exclude=["0"], algorithm="rtn", samples=20)
    assert [(row["name"], row["why"]) for row in rows_of(details, "layers_left_in_float")][:1] == [
        ("0.weight", "excluded")
    ]
    assert {row["group"] for row in rows_of(details)} <= {144, 32}  # a step an output of a convolution
    assert details["sensitivity_samples"] == 20


def test_a_limit_that_no_bits_can_hold_is_refused(context: Context) -> None:
    step = Mixed(max_size=0.1, bits=(4, 8))
    reason = QuantizeTechnique().applies(step, context.model)
    layers = layers_of(step, context.model)
    least = sum(layer.size.bits[0] for layer in layers) / sum(layer.size.floats for layer in layers)
    assert reason is not None
    assert f"With 4 bits everywhere the weights take {least:.4f} of their bytes as floats" in reason
    assert QuantizeTechnique().applies(Mixed(max_size=0.15, bits=(4, 8)), context.model) is None
    with pytest.raises(InvalidSpec, match="matches no layer"):
        QuantizeTechnique().applies(Mixed(max_size=0.15, exclude=("nothing",)), context.model)


def in_nanoseconds(monkeypatch: pytest.MonkeyPatch, bits: list[tuple[int, ...]], floats: list[int]) -> None:
    """Stands for a machine on which products take so long."""
    found = [Costs(own, whole) for own, whole in zip(bits, floats, strict=True)]
    monkeypatch.setattr(mixed, "times_of", lambda *given: found)


def test_time_is_spent_where_it_matters_most(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where 8 bits take as long as floats and 2 bits a tenth."""
    layers = layers_of(Mixed(max_latency=0.5), context.model)
    in_nanoseconds(monkeypatch, [(1000, 500, 500, 100)] * len(layers), [1000] * len(layers))
    loose = quantize(_copied(context), max_latency=1.0)
    assert loose["layers"] == []  # floats are as fast as the limit
    assert {row["why"] for row in rows_of(loose, "layers_left_in_float")} <= {
        "the limit leaves time for floats here",
        "no product that a sample reaches: bits save no time",
    }
    for limit in (0.1, 0.3, 0.6):
        details = quantize(_copied(context), max_latency=limit)
        taken = sum({8: 1000, 4: 500, 3: 500, 2: 100}[bits] for bits in bits_of(details).values())
        taken += 1000 * (len(layers) - len(bits_of(details)))
        assert details["seconds"] == pytest.approx(taken * 1e-9)
        assert details["latency"] == pytest.approx(taken / (1000 * len(layers)))
        assert details["latency"] <= limit  # type: ignore[operator]
        assert details["seconds"] in [row["seconds"] for row in rows_of(details, "searched")]
        assert 3 not in bits_of(details).values()  # which take as long as 4, and lose more


def test_a_time_that_no_bits_can_hold_is_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the layers are measured, which takes long."""
    layers = layers_of(Mixed(max_latency=0.5), context.model)
    monkeypatch.setattr(mixed, "measuring", None)
    in_nanoseconds(monkeypatch, [(1000, 900, 900, 800)] * len(layers), [1000] * len(layers))
    with pytest.raises(InvalidSpec, match=r"takes 0.800 of the time of floats .* more than the max_latency of 0.7"):
        quantize(context, max_latency=0.7)


def test_where_there_is_no_product_time_is_refused(context: Context) -> None:
    model = tiny_model(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), shape=(1, 8, 8))
    assert "for Linear layers" in (applies(Mixed(max_latency=0.5), model) or "")
    assert applies(Mixed(max_latency=0.5), context.model) is None


def test_products_that_no_sample_reaches_are_refused(tmp_path: Path) -> None:
    """Attention reads the weight of its output projection itself."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

        def forward(self, given: Tensor) -> Tensor:
            out: Tensor = self.fc(self.attention(given, given, given)[0].mean(1))
            return out

    data = memory_data({"calibration": (torch.randn(8, 3, 16), None)})
    context = context_for(tiny_model(Attending().eval(), shape=(3, 16), classes=4), data, tmp_path)
    with pytest.raises(InvalidSpec, match="reaches none of the Linear layers"):
        quantize(context, max_latency=0.5, exclude=["fc"], algorithm="rtn")


def test_time_is_that_of_this_machine(tmp_path: Path) -> None:
    """One row through large products: fewer bytes come out of memory."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    context = context_for(tiny_model(module, shape=(64,)), digits_data(), tmp_path)
    details = quantize(context, max_latency=1.0, algorithm="rtn", floats=True)
    assert 0 < details["seconds"] <= details["seconds_as_floats"]  # type: ignore[operator]


def test_without_data_is_refused(context: Context) -> None:
    feed = context.feed
    context.feed = None
    with pytest.raises(DatasetMismatch, match="measures the layers on data: give a dataset"):
        quantize(context, max_size=0.2)
    assert feed is not None
    unjudged = context_for(context.model, part_of(feed.data, {"calibration": 50}), context.scratch)
    with pytest.raises(DatasetMismatch, match="max_accuracy_drop judges by a labelled `validation` split"):
        quantize(unjudged, max_accuracy_drop=0.1)


def test_a_run_again_gives_the_same(context: Context) -> None:
    other = _copied(context)
    assert quantize(context, max_accuracy_drop=0.01) == quantize(other, max_accuracy_drop=0.01)
    for name, weight in context.model.module.named_parameters():
        assert torch.equal(weight, other.model.module.get_parameter(name))


def test_what_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    """Silence behind a logarithm: nothing that is measured says anything."""
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs = torch.randn(40, 6)
    inputs[3, 2] = torch.nan
    context = context_for(
        tiny_model(module, shape=(6,), classes=3), memory_data({"calibration": (inputs, None)}), tmp_path
    )
    with pytest.raises(InvalidSpec, match="gives what is no number"):
        quantize(context, max_size=0.5, algorithm="rtn", group_size=None)


def test_long_outputs_are_measured_on_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_for(
        tiny_model(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))), digits_data(), tmp_path
    )
    assert quantize(_copied(context), max_size=0.5, algorithm="rtn")["sensitivity_samples"] == 100  # all that there are
    monkeypatch.setattr("worker.techniques.pruning.sensitivity.MOST_HELD", 64 * 10 * 4)  # the outputs of a batch
    assert quantize(context, max_size=0.5, algorithm="rtn")["sensitivity_samples"] == 64


def test_a_layer_that_is_smaller_as_floats_counts_as_that(tmp_path: Path) -> None:
    """Steps and zero points of a single input take more than its weights do."""
    module = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1))
    model = tiny_model(module, shape=(1,), classes=1)
    step = Mixed.model_validate({"max_size": 0.55, "group_size": None, "bits": [2]})
    assert applies(step, model) is None
    reason = applies(step.model_copy(update={"floats": False}), model)
    assert reason is not None
    assert "more than the max_size of 0.55" in reason
