"""What comes into layers: its range, and which layers share it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.contract.calibration import Calibration
from app.contract.errors import InvalidSpec
from app.contract.qat import Qat
from tests.worker.helpers import context_for, digits_data, mlp, tiny_model
from worker.context import Context
from worker.techniques.quantization.qat import inputs
from worker.techniques.quantization.static.observing import BINS, range_of
from worker.techniques.quantization.static.ranges_math import Histogram, Range

MINMAX = Qat(calibration=Calibration(method="minmax", samples=100))


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads another, and one that nothing comes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(64, 16) for _ in range(3))
        self.out, self.idle = nn.Linear(16, 10), nn.Linear(4, 4)

    def forward(self, given: Tensor) -> Tensor:
        weights = torch.softmax(self.query(given) * self.key(given), -1)
        out: Tensor = self.out(weights * self.value(given))
        return out


def context_of(module: nn.Module, folder: Path) -> tuple[Context, dict[str, nn.Module]]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return context_for(tiny_model(module), digits_data(), folder), layers


def test_layers_that_read_one_tensor_share_a_range(tmp_path: Path) -> None:
    context, layers = context_of(Attention(), tmp_path)
    found = inputs.ranges(MINMAX, context, layers)
    assert set(found) == {("query", "key", "value"), ("out",)}
    made = inputs.fake_inputs(MINMAX, found)
    assert made["query"] is made["key"] is made["value"] is not made["out"]


def seen(context: Context, layers: dict[str, nn.Module]) -> dict[str, NDArray[np.float32]]:
    """What comes into each layer with the hundred calibration samples."""
    found: dict[str, NDArray[np.float32]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].numpy()}))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    assert context.feed is not None
    with torch.no_grad():
        context.model.module(*next(iter(context.feed.batches("calibration", 100))).inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_minmax_is_all_that_calibration_samples_have(tmp_path: Path) -> None:
    context, layers = context_of(mlp(), tmp_path)
    values = seen(context, layers)
    for (name,), own in inputs.ranges(MINMAX, context, layers).items():
        assert own.low == pytest.approx(min(0.0, float(values[name].min())), rel=1e-6)
        assert own.high == pytest.approx(float(values[name].max()), rel=1e-6)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_other_ways_look_at_all_values(method: Any, tmp_path: Path) -> None:
    context, layers = context_of(mlp(), tmp_path)
    values = seen(context, layers)
    calibration = Calibration(method=method, percentile=95, samples=100)
    for (name,), own in inputs.ranges(Qat(calibration=calibration), context, layers).items():
        low, high = min(0.0, float(values[name].min())), float(values[name].max())
        counts = np.histogram(values[name][values[name] != 0], BINS, (low, high))[0]
        expected = range_of(Histogram(low, high, counts), calibration)
        assert (own.low, own.high) == pytest.approx((expected.low, expected.high), rel=0.02)
        assert method != "percentile" or own.high < high or high == 1  # where many pixels are white


def test_a_grid_spans_its_range_and_has_zero() -> None:
    made = inputs.fake_inputs(MINMAX, {("a", "b"): Range(-1.0, 3.0)})
    found = inputs.learned(made)
    width = 4 / 255
    assert found["a"] == found["b"]
    assert abs(found["a"].low + 1) <= width / 2 + 1e-6
    assert found["a"].high - found["a"].low == pytest.approx(4.0, rel=1e-5)
    assert made["a"](torch.zeros(1, 1)).item() == 0


def test_what_is_zero_with_all_samples_is_not_rounded() -> None:
    """A step of any size would make zeros of all that comes later, and get no gradient to leave it."""
    made = inputs.fake_inputs(MINMAX, {("dead",): Range(0.0, 0.0), ("alive",): Range(0.0, 1.0)})
    assert set(made) == {"alive"}


def test_tied_layers_share_a_range_that_holds_what_comes_into_each(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(4, 4))
    context, layers = context_of(nn.Sequential(*module[:4]), tmp_path)
    layers["idle"] = module[4]
    apart = inputs.ranges(MINMAX, context, layers)
    found = inputs.ranges(MINMAX, context, layers, [["0", "2"], ["3"], ["idle"]])
    assert set(found) == {("0", "2"), ("3",)}
    both = apart["0",], apart["2",]
    assert found["0", "2"].low == pytest.approx(min(own.low for own in both))
    assert found["0", "2"].high == pytest.approx(max(own.high for own in both))
    made = inputs.fake_inputs(MINMAX, found)
    assert made["0"] is made["2"]


def test_copies_round_by_themselves_and_nothing_is_left_behind(tmp_path: Path) -> None:
    module = mlp()
    context, layers = context_of(module, tmp_path)
    before = set(module.state_dict())
    given = torch.rand(3, 64)
    exact = module(given).detach()
    made = inputs.fake_inputs(MINMAX, inputs.ranges(MINMAX, context, layers))
    with inputs.rounding(layers, made):
        twin = copy.deepcopy(module)
        assert not torch.equal(module(given), exact)
        with torch.no_grad():
            for own in twin.modules():
                if isinstance(own, inputs.FakeInput):
                    own.log_step += 3  # of the copy alone
        near, far = ((net(given).detach() - exact).abs().max() for net in (module, twin))
        assert far > 5 * near
    assert torch.equal(module(given), exact)
    assert set(module.state_dict()) == before


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    module = mlp()
    with torch.no_grad():
        module[0].bias[0] = float("inf")
    context, layers = context_of(module, tmp_path)
    with pytest.raises(InvalidSpec, match="what comes into '2' is not finite"):
        inputs.ranges(MINMAX, context, layers)
