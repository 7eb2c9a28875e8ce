"""Which layers are held against each other, in networks whose layers are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from app.contract.errors import InvalidSpec, Unsupported
from tests.worker.helpers import convnet, mlp
from tests.worker.nets import bert
from worker.constraints import impose_mask, impose_rounding
from worker.techniques.quantization.qat.inputs import rounding
from worker.techniques.quantization.qat.lsq import FakeInput, FakeQuantized
from worker.training.distilling.mapping import (
    Pair,
    features,
    hidden_pairs,
    map_pairs,
    named_attentions,
    named_pairs,
)
from worker.training.distilling.recording import Survey, survey

IDS = (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
DIGITS = (torch.zeros(2, 1, 8, 8),)


def names(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(ours.name, theirs.name) for ours, theirs in pairs]


def of_bert(layers: int, hidden: int = 32) -> Survey:
    return survey(bert(layers=layers, hidden=hidden), IDS)


def test_blocks_are_mapped_by_depth() -> None:
    prefix = "inner.bert.encoder.layer"
    found = names(hidden_pairs(of_bert(2, hidden=16), of_bert(6)))
    assert found == [(f"{prefix}.0", f"{prefix}.2"), (f"{prefix}.1", f"{prefix}.5")]
    assert names(hidden_pairs(of_bert(1), of_bert(3))) == [(f"{prefix}.0", f"{prefix}.2")]
    assert names(hidden_pairs(of_bert(3), of_bert(3))) == [(f"{prefix}.{i}", f"{prefix}.{i}") for i in range(3)]


def test_transformers_show_their_probabilities() -> None:
    pairs, probabilities = map_pairs(of_bert(1), of_bert(2))
    name = "inner.bert.encoder.layer.{}.attention.self"
    assert probabilities
    assert names(pairs) == [(name.format(0), name.format(1))]
    assert pairs[0][0].shape == (2, 2, 5, 5)
    assert named_attentions([(name.format(0), name.format(0))], of_bert(1), of_bert(2)) is not None
    assert named_attentions([("inner.bert.encoder.layer.0", name.format(0))], of_bert(1), of_bert(2)) is None


def test_maps_are_taken_at_the_end_of_each_size() -> None:
    deeper = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *convnet()[0:0], nn.Conv2d(4, 4, 2, stride=2))
    found, probabilities = map_pairs(survey(deeper, DIGITS), survey(convnet(), DIGITS))
    assert not probabilities
    assert names(found) == [("1", "2"), ("2", "5")]  # of 8 x 8, and of 4 x 4
    assert names(hidden_pairs(survey(deeper, DIGITS), survey(convnet(), DIGITS))) == [("1", "2"), ("2", "5")]


def test_layers_of_a_perceptron_are_mapped_by_depth_without_the_last() -> None:
    small = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    rows = (torch.zeros(2, 64),)
    assert names(hidden_pairs(survey(small, rows), survey(mlp(), rows))) == [("0", "2")]
    assert features(survey(mlp(), rows)).name == "4"


def test_a_mask_on_a_weight_is_no_layer() -> None:
    masked = convnet()
    impose_mask(masked, "0.weight", torch.ones(16, 1, 3, 3))
    assert survey(masked, DIGITS) == survey(convnet(), DIGITS)


@pytest.mark.parametrize("make", [convnet, mlp])
def test_what_rounds_the_input_of_a_layer_is_no_layer(make: Callable[[], nn.Module]) -> None:
    network = make()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    example = DIGITS if "8" in layers else (torch.zeros(2, 64),)
    exact = survey(network, example)
    for name, layer in layers.items():
        steps = torch.ones(len(layer.weight), 1)
        impose_rounding(network, f"{name}.weight", FakeQuantized(steps, 0 * steps, -7, 7))
    made = {name: FakeInput(torch.ones(1), torch.zeros(1), 0, 255) for name in layers}
    with rounding(layers, made):
        assert survey(network, example) == exact
        assert features(survey(network, example)).name == list(layers)[-1]


def test_named_layers_are_taken_and_unknown_ones_named() -> None:
    network = survey(convnet(), DIGITS)
    assert names(named_pairs([("1", "4")], network, network)) == [("1", "4")]
    with pytest.raises(InvalidSpec, match=r"The teacher has no layer 'conv1'. Its layers are 0, 1"):
        named_pairs([("1", "conv1")], network, network)


def test_networks_with_nothing_in_common_are_refused() -> None:
    single = survey(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), DIGITS)
    with pytest.raises(Unsupported, match="name them in layers"):
        hidden_pairs(single, single)
    with pytest.raises(Unsupported, match="neither"):
        map_pairs(single, survey(convnet(), DIGITS))
    with pytest.raises(Unsupported, match="single layer"):
        features(single)


def test_a_survey_leaves_the_network_as_it_was() -> None:
    network = convnet().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    survey(network, DIGITS)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(layer._forward_hooks for layer in network.modules())
