"""Which weights decay and how fast layers learn, on networks whose layers are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.contract.training import Training
from tests.worker.helpers import convnet
from tests.worker.nets import bert
from worker.constraints import impose_mask, impose_rounding
from worker.techniques.quantization.qat.lsq import FakeQuantized
from worker.training.groups import depths, groups


def by_name(module: nn.Module, training: Training) -> dict[str, tuple[float, float]]:
    """(weight decay, scale) of every parameter."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["scale"])
        for group in groups(module, training)
        for parameter in group["params"]
    }


def test_norms_and_biases_do_not_decay_unless_asked() -> None:
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.LayerNorm([4, 6]), nn.Flatten(), nn.Linear(24, 2))
    decays = {name: decay for name, (decay, _) in by_name(network, Training(weight_decay=0.1)).items()}
    assert decays == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0.1, "3.bias": 0}
    everywhere = by_name(network, Training(weight_decay=0.1, decay_norms=True))
    assert {decay for decay, _ in everywhere.values()} == {0.1}


def test_steps_of_grids_never_decay() -> None:
    network = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    impose_rounding(network, "0.weight", FakeQuantized(torch.ones(2, 1), torch.zeros(2, 1), -7, 7))
    for asked in (True, False):
        decays = by_name(network, Training(weight_decay=0.1, decay_norms=asked))
        found = {name.rpartition(".")[2]: decay for name, (decay, _) in decays.items() if name.startswith("0.")}
        assert found == {"original": 0.1, "log_step": 0.0, "bias": 0.1 if asked else 0.0}


def test_frozen_and_shared_parameters_are_in_no_group_and_in_one() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    network[2].requires_grad_(False)
    assert list(by_name(network, Training())) == ["0.weight", "0.bias", "1.bias"]


def test_the_layers_of_a_stack_learn_the_slower_the_lower_they_are() -> None:
    network = convnet()  # convolution, norm, convolution, linear
    impose_mask(network, "0.weight", torch.ones(16, 1, 3, 3))
    scales = {name: scale for name, (_, scale) in by_name(network, Training(layer_decay=0.5)).items()}
    assert scales == {
        "0.parametrizations.weight.original": 0.25,
        "0.bias": 0.25,
        "1.weight": 0.25,
        "1.bias": 0.25,
        "4.weight": 0.5,
        "4.bias": 0.5,
        "8.weight": 1.0,
        "8.bias": 1.0,
    }


def test_a_transformers_layers_are_its_embeddings_its_blocks_and_its_head() -> None:
    network = bert(layers=3)
    depth = depths(network)
    found = {name: depth[id(parameter)] for name, parameter in network.named_parameters()}
    assert found["inner.bert.embeddings.word_embeddings.weight"] == 0
    assert found["inner.bert.embeddings.LayerNorm.weight"] == 0
    for layer in range(3):
        own = {at for name, at in found.items() if f".layer.{layer}." in name}
        assert own == {layer + 1}
    assert (found["inner.bert.pooler.dense.weight"], found["inner.classifier.weight"]) == (4, 5)


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_a_single_layer_learns_at_the_rate_itself(network: nn.Module) -> None:
    assert {scale for _, scale in by_name(network, Training(layer_decay=0.5)).values()} == {1.0}
