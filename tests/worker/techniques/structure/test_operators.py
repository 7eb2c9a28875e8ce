"""Graphs of layers compute what the layers do, and are timed for what comes into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.loading.onnx_session import open_session
from worker.techniques.structure.operators import VALUE, Clock, _graph, has_operator, shapes_given

CHAINS = {
    "linear": ([nn.Linear(6, 4)], (3, 6)),
    "without a bias": ([nn.Linear(6, 4, bias=False)], (1, 5, 6)),
    "GPT-2's": ([Conv1D(4, 6)], (1, 5, 6)),
    "convolution": ([nn.Conv2d(3, 4, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1))], (1, 3, 12, 11)),
    "same": ([nn.Conv2d(3, 4, 4, padding="same")], (1, 3, 7, 7)),
    "valid": ([nn.Conv1d(3, 4, 2, padding="valid", bias=False)], (1, 3, 7)),
    "depthwise": ([nn.Conv3d(4, 4, 2, groups=4)], (1, 4, 5, 5, 5)),
    "a product": ([nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 5, 1)], (1, 3, 6, 6)),
    "nothing": ([], (1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_graph_computes_what_its_layers_do(name: str) -> None:
    """With the weights and the input that it is timed with."""
    chain, given = CHAINS[name]
    for parameter in (own for layer in chain for own in layer.parameters()):
        nn.init.constant_(parameter, VALUE)
    x = torch.full(given, VALUE)
    (got,) = open_session(_graph(chain, given), 1).run(None, {"x0": x.numpy()})
    np.testing.assert_allclose(got, nn.Sequential(*chain)(x).detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "has"),
    [
        (nn.Linear(2, 2), True),
        (Conv1D(2, 2), True),
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), True),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.ConvTranspose2d(2, 2, 3), False),
        (nn.LSTM(2, 2), False),
        (nn.Embedding(2, 2), False),
    ],
)
def test_matrices_and_convolutions_have_an_operator(layer: nn.Module, has: bool) -> None:
    assert has_operator(layer) == has


def test_layers_that_compute_something_else_have_none() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert not has_operator(Scaled(2, 2))


def test_each_call_of_a_layer_has_its_shape(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(self.shared(x)[:, :2])

    module = Twice()
    context = context_for(tiny_model(module, shape=(4, 3)), memory_data({}), tmp_path)
    layers = {"shared": module.shared, "unused": module.unused}
    assert shapes_given(context, layers) == {"shared": [(1, 4, 3), (1, 2, 3)], "unused": []}


def test_a_convolution_has_a_batch(tmp_path: Path) -> None:
    """torch's does without."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.over = nn.Parameter(torch.randn(3, 8)), nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.over(self.positions)

    module = Positions()
    context = context_for(tiny_model(module, shape=(3, 8)), memory_data({}), tmp_path)
    shapes = shapes_given(context, {"over": module.over})
    assert shapes == {"over": [(1, 3, 8)]}
    assert Clock(1).seconds([module.over], shapes["over"][0]) >= 0


def test_layers_whose_weight_is_computed_have_none() -> None:
    assert not has_operator(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not has_operator(nn.utils.spectral_norm(nn.Linear(2, 2)))


def test_a_clock_tells_more_work_from_less_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1)
    large = clock.seconds([nn.Linear(2048, 2048)], (1, 64, 2048))
    assert large > 10 * clock.seconds([nn.Linear(64, 64)], (1, 64, 64))
    monkeypatch.setattr(Clock, "_taken", None)
    assert clock.seconds([nn.Linear(2048, 2048)], (1, 64, 2048)) == large
