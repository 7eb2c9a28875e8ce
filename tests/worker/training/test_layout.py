"""Channels last while a network trains: as it was afterwards, the same weights but for rounding, and not where a
network looks at strides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from app.contract.distillation import Distill
from app.contract.training import Training
from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.constraints import impose_mask
from worker.training.layout import channels_last
from worker.training.loop import train

EXAMPLE = (torch.zeros(2, 1, 12, 12),)


class Flat(nn.Module):
    """`view` takes a tensor as it lies in memory."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.view(len(tensor), -1)


def network(flat: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), flat, nn.Linear(64, 3)
    )


def strides(module: nn.Module) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in (*module.parameters(), *module.buffers())]


def test_channels_lie_last_within_and_not_behind() -> None:
    module = network(nn.Flatten())
    before, values = strides(module), copy.deepcopy(module.state_dict())
    with channels_last(module, EXAMPLE):
        inner = module[0](EXAMPLE[0])
        assert inner.stride()[1] == 1, "what a convolution of one channel gives lies so too"
        assert not inner.is_contiguous()
    assert strides(module) == before
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name])


def test_a_network_that_looks_at_strides_is_left_alone() -> None:
    module = network(Flat())
    before, training = strides(module), module.training
    with channels_last(module, EXAMPLE):
        assert strides(module) == before
        module(*EXAMPLE)
    assert module.training == training


class Auxiliary(nn.Module):
    """A second head that is there in training alone, and looks at strides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(nn.Flatten())

    def forward(self, tensor: Tensor) -> Tensor:
        found: Tensor = self.body(tensor)
        if self.training:
            early = self.body[0](tensor)
            found = found + early.view(len(early), -1).mean()
        return found


class Backwards(torch.autograd.Function):
    """Looks at strides on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view(-1).view_as(gradient)


class Mirror(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        found: Tensor = Backwards.apply(tensor)
        return found


class Picky(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            raise ValueError("as it was, please")
        return tensor.flatten(1)


@pytest.mark.parametrize(
    "module",
    [Auxiliary(), nn.Sequential(nn.Conv2d(1, 6, 3), Mirror(), nn.Conv2d(6, 4, 3), nn.Flatten()), network(Picky())],
    ids=["in training alone", "on the way back", "another error"],
)
def test_what_shows_in_training_alone(module: nn.Module) -> None:
    before, values = strides(module), copy.deepcopy(module.state_dict())
    module.eval()
    with channels_last(module, EXAMPLE):
        assert strides(module) == before
    assert not any(layer.training for layer in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name]), "the trial left something behind"


def test_masked_weights_lie_so_too() -> None:
    module = network(nn.Flatten())
    impose_mask(module, "4.weight", torch.rand(4, 6, 2, 2) > 0.5)
    with channels_last(module, EXAMPLE):
        assert module[4].weight.stride()[1] == 1  # type: ignore[union-attr,operator]
    assert module[4].weight.is_contiguous()  # type: ignore[union-attr,operator]


def test_weights_that_are_computed_are_left_alone() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Conv2d(4, 2, 3), nn.Flatten())
    prune.random_unstructured(module[1], "weight", 0.5)
    before = strides(module)
    with channels_last(module, EXAMPLE):
        assert strides(module) == before


def test_weights_that_share_their_memory_stay_together() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten())
    both = torch.randn(2, 4, 4, 3, 3)
    module[1].weight = nn.Parameter(both[0])
    with channels_last(module, (torch.zeros(2, 2, 8, 8),)):
        pass
    assert module[1].weight.data_ptr() == both.data_ptr()


def test_put_back_after_an_error() -> None:
    module = network(nn.Flatten())
    before = strides(module)
    with pytest.raises(KeyError), channels_last(module, EXAMPLE):
        raise KeyError
    assert strides(module) == before


def test_a_network_without_such_convolutions_is_not_asked() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    with channels_last(module, (torch.zeros(2, 7),)):  # which it could not take
        pass


@pytest.mark.parametrize("flat", [nn.Flatten(), Flat()], ids=["flatten", "view"])
def test_training_gives_the_weights_of_a_loop_by_hand(flat: nn.Module, tmp_path: Path) -> None:
    inputs, targets = torch.randn(64, 1, 12, 12), torch.randint(0, 3, (64,))
    model = tiny_model(network(flat), shape=(1, 12, 12), classes=3)
    own = copy.deepcopy(model.module)
    context = context_for(model, memory_data({"train": (inputs, targets)}), tmp_path)
    training = Training(epochs=3, batch_size=64, optimizer="sgd", lr=0.1)
    train(context, training)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9, weight_decay=training.weight_decay)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(own(inputs), targets).backward()
        optimizer.step()
    for mine, theirs in zip(model.module.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        assert mine.is_contiguous()


def test_the_teacher_is_put_back_too(tmp_path: Path) -> None:
    model = tiny_model(network(nn.Flatten()), shape=(1, 12, 12), classes=3)
    context = context_for(model, memory_data({"train": (torch.randn(32, 1, 12, 12), None)}), tmp_path)
    before = strides(context.teacher)
    train(context, Training(epochs=1, distill=Distill(alpha=1.0)))
    assert strides(context.teacher) == before
