"""Teacher and student see one batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.contract.errors import ModelsMismatch
from tests.worker.helpers import memory_data, mlp, tiny_model
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.encodings import check_encodings

DATA = memory_data({"train": (torch.randn(9, 64), None)})


def scaled(raw: RawBatch) -> Inputs:
    assert isinstance(raw.inputs, dict)
    return (raw.inputs["input"] * 2,)


def test_models_that_prepare_samples_alike_may_teach_each_other() -> None:
    check_encodings(tiny_model(mlp()), tiny_model(mlp(seed=1)), "mdl_1", "/steps/0", DATA)
    check_encodings(tiny_model(mlp()), replace(tiny_model(mlp()), encode=scaled), "mdl_1", "/steps/0", None)


def test_other_preparations_are_refused_by_name() -> None:
    other = replace(tiny_model(mlp()), encode=scaled)
    with pytest.raises(ModelsMismatch, match="mdl_1 makes other inputs") as caught:
        check_encodings(tiny_model(mlp()), other, "mdl_1", "/steps/0/student/model", DATA)
    assert caught.value.pointer == "/steps/0/student/model"
