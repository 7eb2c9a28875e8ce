"""What a sample costs, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.contract.facts import LayerFacts, TensorFacts
from tests.worker.helpers import mlp, tiny_model
from tests.worker.nets import LENET_MACS, Recurrent, bert, lenet, model_of, text_model
from worker.evaluation.cost import BATCH, TRAINING_COPIES, measure_cost, saved_bytes, tensor_bytes
from worker.evaluation.macs import layer_macs
from worker.loading.describe import layer_facts
from worker.model import Model


def described(model: Model) -> Model:
    """With the layers as a loader lists them."""
    facts = model.facts.model_copy(update={"layers": layer_facts(model.module)})
    return Model(model.module, facts, model.encode, model.save, model.task)


def macs(layers: tuple[LayerFacts, ...]) -> dict[str, int | None]:
    return {layer.name: layer.macs for layer in layers}


def test_lenets_layers_by_hand() -> None:
    cost, layers = measure_cost(described(tiny_model(lenet().eval(), shape=(1, 28, 28))))
    assert macs(layers) == {"0": 117_600, "3": 240_000, "7": 48_000, "9": 10_080, "11": 840}
    assert cost.macs == LENET_MACS
    assert cost.length is None
    assert cost.weight_bytes == 4 * 61_706
    assert cost.training_bytes == TRAINING_COPIES * 4 * 61_706
    assert cost.seconds > 0


def test_what_training_keeps_of_a_sample_by_hand() -> None:
    """Each Linear keeps its input, each ReLU its output, which is the next one's input: 64 + 64 + 32 floats."""
    cost, _ = measure_cost(described(tiny_model(mlp().eval())))
    assert cost.activation_bytes == 4 * (64 + 64 + 32)
    assert cost.inference_bytes == cost.weight_bytes + cost.activation_bytes


def test_weights_are_not_kept_for_a_sample() -> None:
    module = nn.Linear(1000, 10)
    assert saved_bytes(module, (torch.zeros(3, 1000),)) == 3 * 4000


def test_tied_weights_count_once() -> None:
    weight = torch.zeros(10, 10)
    assert tensor_bytes([weight, weight, weight.T, torch.zeros(5)]) == 400 + 20


def test_a_layer_with_several_weights_counts_once() -> None:
    module = Recurrent(nn.LSTM)
    cost, layers = measure_cost(described(text_model(module.eval(), classes=4)))
    assert cost.length == 32
    assert macs(layers) == {"emb": 0, "rnn.weight_ih_l0": 32 * 4 * 24 * (16 + 24), "rnn.weight_hh_l0": 0, "fc": 96}


def test_layers_add_up_but_for_attention() -> None:
    module = bert()
    names = [TensorFacts(name=name, shape=(None,), dtype="int64") for name in ("input_ids", "attention_mask")]
    cost, layers = measure_cost(described(model_of(module, *names, classes=3)))
    attention = 2 * 32 * 2 * 32 * 32  # layers x tokens x (scores and values) x tokens x width
    assert sum(layer.macs or 0 for layer in layers) == cost.macs - attention
    assert BATCH == 2


def test_modules_hold_what_is_inside_them() -> None:
    found = layer_macs(lenet(), (torch.zeros(1, 1, 28, 28),))
    assert found[""] == LENET_MACS == sum(found[name] for name in ("0", "3", "7", "9", "11"))


@pytest.mark.parametrize("batch", [1, 3])
def test_memory_grows_with_the_batch(batch: int) -> None:
    assert saved_bytes(mlp().eval(), (torch.zeros(batch, 64),)) == batch * 4 * (64 + 64 + 32)
