"""Which weights can be pruned, and by which names they are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.contract.errors import InvalidSpec
from tests.worker.helpers import mlp
from tests.worker.test_constraints import Tied
from worker.constraints import impose_mask
from worker.techniques.pruning.weights import prunable, select

LAYERS: dict[str, tuple[nn.Module, list[str]]] = {
    "linear": (nn.Linear(3, 2), ["weight"]),
    "conv1d": (nn.Conv1d(1, 2, 3), ["weight"]),
    "conv3d": (nn.Conv3d(1, 2, 3), ["weight"]),
    "transposed": (nn.ConvTranspose2d(1, 2, 3), ["weight"]),
    "embedding": (nn.Embedding(4, 2), ["weight"]),
    "norm": (nn.LayerNorm(4), []),
    "batch norm": (nn.BatchNorm1d(4), []),
    "prelu": (nn.PReLU(), []),
    "lstm": (nn.LSTM(2, 3, proj_size=1), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
    "gru": (
        nn.GRU(2, 3, bidirectional=True),
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    ),
    "attention": (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    "attention of other widths": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "encoder": (
        nn.TransformerEncoderLayer(4, 2, 8),
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
    ),
    "tied": (Tied(), ["embedding.weight"]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_and_kernels_are_found_by_name(kind: str) -> None:
    layer, names = LAYERS[kind]
    assert [weight.name for weight in prunable(layer)] == names
    assert set(names) <= set(layer.state_dict())


def test_a_masked_weight_keeps_its_name() -> None:
    network = mlp()
    names = [weight.name for weight in prunable(network)]
    for name in names:
        impose_mask(network, name, torch.zeros_like(network.get_parameter(name)))
    assert [weight.name for weight in prunable(network)] == names == ["0.weight", "2.weight", "4.weight"]
    assert not any(weight.value().any() for weight in prunable(network))


def test_gpt2s_linear_layer_is_one() -> None:
    from transformers.pytorch_utils import Conv1D

    assert [weight.name for weight in prunable(nn.Sequential(Conv1D(3, 2)))] == ["0.weight"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [((), ["0", "2", "4"]), (("0",), ["2", "4"]), (("[02]",), ["4"]), (("4.weight", "2"), ["0"])],
)
def test_patterns_exclude_layers(exclude: tuple[str, ...], left: list[str]) -> None:
    assert [weight.layer for weight in select(mlp(), exclude)] == left


def test_a_pattern_that_matches_nothing_names_the_layers() -> None:
    with pytest.raises(InvalidSpec, match=r"'conv\*' matches no layer .* There are 0, 2, 4\."):
        select(mlp(), ("0", "conv*"))


def test_a_pattern_that_matches_everything_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="exclude leaves nothing of 0, 2, 4"):
        select(mlp(), ("*",))
