"""Masks hold through everything that follows, and `baked` gives plain weights with exact zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from worker.constraints import baked, computed, impose_mask, masks, stored
from worker.techniques.pruning.weights import prunable


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, as in BERT's language-model head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.output = nn.Linear(6, 12)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.embedding(ids)).mean(1)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), lambda: torch.randn(4, 6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Flatten()),
        lambda: torch.randn(4, 1, 6, 6),
    ),
    "tied": (Tied, lambda: torch.randint(0, 12, (4, 5))),
    "lstm": (lambda: Last(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)), lambda: torch.randn(4, 5, 3)),
    "gru": (lambda: Last(nn.GRU(3, 4, batch_first=True)), lambda: torch.randn(4, 5, 3)),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten()),
        lambda: torch.randn(4, 5, 8),
    ),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, weight_decay=0.1),
}


def mask_matrices(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Drops about half of every weight with two or more dimensions."""
    generator = torch.Generator().manual_seed(seed)
    wanted = {
        name: torch.rand(weight.shape, generator=generator) > 0.5
        for name, weight in module.named_parameters()
        if weight.ndim > 1
    }
    for name, mask in wanted.items():
        impose_mask(module, name, mask)
    return wanted


def is_positive_zero(values: Tensor) -> bool:
    return bool((values.view(torch.int32) == 0).all())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_masked_network_computes_with_the_masked_weights(kind: str) -> None:
    make, sample = NETWORKS[kind]
    network, inputs = make().eval(), sample()
    by_hand = copy.deepcopy(network)
    wanted = mask_matrices(network)
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            if name in wanted:
                weight.copy_(weight.masked_fill(~wanted[name], 0.0))
    with torch.inference_mode():
        expected = by_hand(inputs)
        torch.testing.assert_close(network(inputs), expected)  # the fast path of the encoder layer included
        torch.testing.assert_close(baked(network)(inputs), expected)
    torch.testing.assert_close(network(inputs), by_hand(inputs))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_pruned_weights_stay_exact_zeros_through_training(kind: str, optimizer: str) -> None:
    make, sample = NETWORKS[kind]
    network = make()
    updates = OPTIMIZERS[optimizer](list(network.parameters()))
    inputs = sample()

    def train(steps: int) -> None:
        for _ in range(steps):
            updates.zero_grad()
            network(inputs).square().mean().backward()
            updates.step()

    train(5)  # momentum is there before the mask comes
    wanted = mask_matrices(network)
    before = {name: weight.clone() for name, weight in baked(network).named_parameters()}
    train(50)
    after = dict(baked(network).named_parameters())
    assert wanted
    for name, mask in wanted.items():
        assert is_positive_zero(after[name].detach()[~mask])
        assert (after[name][mask] != before[name][mask]).any()


@pytest.mark.parametrize("kind", NETWORKS)
def test_baked_has_the_state_dict_and_the_classes_of_the_plain_network(kind: str) -> None:
    make, sample = NETWORKS[kind]
    plain = make()
    network = copy.deepcopy(plain)
    mask_matrices(network)
    network(sample()).sum().backward()
    copied = baked(network)
    assert copied.state_dict().keys() == plain.state_dict().keys()
    assert [type(layer) for layer in copied.modules()] == [type(layer) for layer in plain.modules()]
    assert not copied.training
    assert network.training
    assert masks(copied) == {}
    with torch.no_grad():
        next(iter(copied.parameters())).add_(1.0)
    assert not torch.equal(next(iter(copied.parameters())), next(iter(baked(network).parameters())))


def test_a_weight_that_layers_share_has_one_mask_and_stays_shared() -> None:
    network = Tied()
    wanted = torch.rand(12, 6) > 0.5
    impose_mask(network, "output.weight", wanted)
    assert list(masks(network)) == ["embedding.weight"]
    assert torch.equal(network.embedding.weight, network.output.weight)
    assert stored(network.embedding, "weight") is stored(network.output, "weight")
    assert len(list(network.parameters())) == 2
    copied = baked(network)
    assert isinstance(copied, Tied)
    assert copied.embedding.weight is copied.output.weight
    assert is_positive_zero(copied.output.weight.detach()[~wanted])


def test_a_networks_own_parametrizations_stay_as_they_are() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    network = nn.Sequential(normed, nn.Flatten(), nn.Linear(9, 4))
    impose_mask(network, "2.weight", torch.rand(4, 9) > 0.5)
    copied = baked(network)
    sample = torch.randn(5, 2, 4)
    assert torch.equal(copied(sample), network(sample))
    assert "0.parametrizations.weight.original1" in copied.state_dict()
    assert "2.weight" in copied.state_dict()
    assert list(masks(network)) == ["2.weight"]
    assert (computed(normed), computed(network[2]), computed(nn.Linear(2, 2))) == (True, False, False)
    assert [weight.name for weight in prunable(network)] == ["2.weight"]
    with pytest.raises(AttributeError, match="no parameter 'weight'"):
        impose_mask(network, "0.weight", torch.ones(3, 2, 2, dtype=torch.bool))


def test_two_masks_on_one_weight_are_combined_by_and() -> None:
    network = nn.Linear(4, 1, bias=False)
    impose_mask(network, "weight", torch.tensor([[True, True, False, False]]))
    impose_mask(network, "weight", torch.tensor([[True, False, True, False]]))
    assert masks(network)["weight"].tolist() == [[True, False, False, False]]
    assert len(network.parametrizations["weight"]) == 1  # type: ignore[index,arg-type]
    assert (network.weight != 0).tolist() == [[True, False, False, False]]


def test_a_pruned_weight_is_positive_zero_whatever_it_was() -> None:
    network = nn.Linear(4, 1, bias=False)
    network.weight.data = torch.tensor([[-1.0, float("inf"), float("nan"), -2.0]])
    impose_mask(network, "weight", torch.tensor([[False, False, False, True]]))
    stored(network, "weight").data[0, 0] = -5.0  # what stale momentum may do to the stored parameter
    weight = baked(network).state_dict()["weight"]
    assert is_positive_zero(weight[0, :3])
    assert weight[0, 3] == -2.0


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [("weight", (4,), ValueError), ("scale", (1, 4), AttributeError), ("inner.weight", (1, 4), AttributeError)],
)
def test_a_mask_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        impose_mask(nn.Linear(4, 1), name, torch.ones(shape))
