"""Columns of inputs: the layer's output is the matrix of its weight times them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from worker.techniques.pruning.inputs import columns, matrix, takes_columns, unmatrix, watching
from worker.techniques.pruning.weights import prunable

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear on steps": (nn.Linear(6, 5), (3, 4, 6)),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 7, 6)),
    "conv2d strided": (nn.Conv2d(4, 5, (3, 2), stride=2, dilation=2, padding=(2, 1)), (2, 4, 9, 8)),
    "conv2d same": (nn.Conv2d(2, 3, 4, padding="same"), (2, 2, 7, 6)),
    "conv2d reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 7, 6)),
    "conv1d": (nn.Conv1d(3, 5, 4, stride=3, padding=2), (2, 3, 17)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_the_matrix_times_the_columns(name: str) -> None:
    layer, shape = LAYERS[name]
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (weight,) = prunable(layer)
    expected = layer(given)
    outputs = expected.shape[1] if expected.ndim > 2 and not isinstance(layer, nn.Linear) else expected.shape[-1]
    if not isinstance(layer, nn.Linear):
        expected = expected.movedim(1, -1)
    found = columns(layer, given) @ matrix(weight, weight.value()).T + layer.bias
    torch.testing.assert_close(found, expected.reshape(-1, outputs), rtol=1e-4, atol=1e-5)
    assert torch.equal(unmatrix(weight, matrix(weight, weight.value())), weight.value())
    with watching([layer], full=True) as full, watching([layer], full=False) as diagonal:
        layer(given)
        layer(given)
    rows = columns(layer, given)
    assert full[0].sum is not None
    torch.testing.assert_close(full[0].sum, 2 * rows.T @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(diagonal[0].sum, full[0].sum.diagonal(), rtol=1e-4, atol=1e-4)


def test_what_no_matrix_says_is_left_out() -> None:
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(4, 4), nn.LSTM(4, 4), nn.ConvTranspose2d(4, 4, 3)):
        assert not takes_columns(layer)
