"""A user's model that knows the digits, for techniques to work on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, mlp, tiny_model
from worker.context import Context
from worker.data.base import Data
from worker.training.loop import train


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_data()


@pytest.fixture(scope="module")
def trained(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    context = context_for(tiny_model(mlp()), digits, tmp_path_factory.mktemp("trained"))
    train(context, Training(epochs=15, lr=3e-3))
    return context.model.module


@pytest.fixture
def context(trained: nn.Module, digits: Data, tmp_path: Path) -> Context:
    return context_for(tiny_model(copy.deepcopy(trained)), digits, tmp_path)
