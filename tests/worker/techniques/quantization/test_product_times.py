"""How long products take: which are measured, for how many rows, and in what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from app.contract.mixed import Mixed
from app.contract.weight_only import FewBits
from worker.constraints import impose_mask
from worker.techniques.pruning.weights import prunable
from worker.techniques.quantization import product_times
from worker.techniques.quantization.mixed_math import Costs
from worker.techniques.quantization.product_times import times_of

WIDTHS = (8, 4, 3, 2)


class Reader(nn.Module):
    """Tokens [batch, 7] through two products of one shape, of which one is read twice, and one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.twice, self.once = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.head, self.apart = nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.once(self.twice(self.twice(input=self.table(tokens))))
        out: Tensor = self.head(hidden.mean(1))
        return out


def step_of(**fields: Any) -> Mixed:
    return Mixed.model_validate({"max_latency": 0.5, "algorithm": "rtn"} | fields)


def measured(module: nn.Module, sample: Tensor, step: FewBits, folder: Path) -> dict[str, Costs]:
    weights = prunable(module)
    found = times_of(step, WIDTHS, module, weights, (sample,), folder)
    return {weight.name: own for weight, own in zip(weights, found, strict=True)}


def test_each_shape_is_measured_once_for_the_rows_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def measure(step: FewBits, widths: Any, value: Tensor, group: int, rows: int, folder: Path) -> Costs:
        asked.append((*value.shape, group, rows))
        return Costs(tuple(rows * bits for bits in widths), 32 * rows)

    monkeypatch.setattr(product_times, "_measured", measure)
    found = measured(Reader(), torch.zeros(3, 7, dtype=torch.int64), step_of(), tmp_path)
    assert sorted(asked) == [(5, 32, 32, 1), (32, 32, 32, 7)]
    assert found["twice.weight"] == Costs(tuple(14 * bits for bits in WIDTHS), 32 * 14)  # two calls of 7 rows
    assert found["once.weight"].floats == 32 * 7
    assert found["head.weight"].floats == 32
    assert found["apart.weight"] == found["table.weight"] == Costs((0, 0, 0, 0), 0)  # not reached; no product


def test_a_weight_that_layers_share_is_in_the_products_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "_measured", lambda *given: Costs((1, 1, 1, 1), 1))
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5))
    module[1].weight = module[0].weight
    impose_mask(module, "2.weight", torch.rand(5, 32) > 0.5)
    found = measured(module, torch.zeros(2, 32), step_of(), tmp_path)
    assert {name: own.floats for name, own in found.items()} == {"0.weight": 2, "2.weight": 1}


def test_what_gpt2_calls_its_linear_layers_are_products(tmp_path: Path) -> None:
    found = measured(nn.Sequential(Conv1D(48, 32)), torch.randn(2, 7, 32), step_of(group_size=16), tmp_path)
    (own,) = found.values()
    assert min(*own.bits, own.floats) > 0
    assert own.bits[1] == own.bits[2]  # 3 bits are stored in 4


@pytest.mark.parametrize("fields", [{}, {"symmetric": True}, {"algorithm": "hqq"}, {"group_size": None}])
def test_what_is_measured_is_what_the_exporter_stores(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops: dict[str, list[str]] = {}
    graphs = product_times._graphs

    def noted(*given: Any) -> Any:
        made = graphs(*given)
        paths = made.__enter__()
        for name, path in paths.items():
            graph = onnx.load(path).graph
            ops[name] = [node.op_type for node in graph.node]
            assert sum(len(one.raw_data) for one in graph.initializer) < (5 * 256 * 96 if name == "floats" else 60_000)
        made.__exit__(None, None, None)
        return graphs(*given)

    monkeypatch.setattr(product_times, "_graphs", noted)
    module = nn.Sequential(nn.Linear(256, 96))
    (found,) = measured(module, torch.randn(2, 256), step_of(**fields), tmp_path).values()
    assert min(*found.bits, found.floats) > 0
    assert ops["floats"] == ["MatMul"]
    assert ops.keys() == {"floats", "8", "4", "2"}
    assert all("MatMulNBits" in ops[bits] for bits in ("8", "4", "2"))
    assert all(("ReduceSum" in ops[bits]) == ("algorithm" in fields) for bits in ("8", "4", "2"))
    assert list(tmp_path.iterdir()) == []


def test_more_rows_take_longer(tmp_path: Path) -> None:
    """By far: hundreds of times the work."""
    module = nn.Sequential(nn.Linear(256, 256))
    few, many = (measured(module, torch.randn(1, rows, 256), step_of(), tmp_path)["0.weight"] for rows in (1, 512))
    assert min(*many.bits, many.floats) > 3 * max(few.floats, min(few.bits))
    assert np.isfinite(many.bits).all()
