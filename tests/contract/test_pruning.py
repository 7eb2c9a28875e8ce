"""What can be asked of the prune step, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.pruning import Prune

TRAINING = {"epochs": 1}


@pytest.mark.parametrize(
    ("fields", "scope"),
    [
        ({"sparsity": 0.5}, "global"),
        ({"sparsity": 0.5, "criterion": "taylor"}, "global"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "layer"),
        ({"granularity": "2:4"}, "layer"),
        ({"granularity": "2:4", "criterion": "sparsegpt"}, "layer"),
        ({"sparsity": 0.5, "scope": "erk"}, "erk"),
    ],
)
def test_the_scope_that_is_usual_is_the_default(fields: dict[str, Any], scope: str) -> None:
    assert Prune(**fields).within == scope


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "block", "block": [1, 4], "sparsity": 0.9, "norm": "l2", "scope": "auto"},
        {"granularity": "4:8", "training": TRAINING},
        {"sparsity": 0.9, "schedule": "iterative", "rewind": "weights", "training": TRAINING},
        {"sparsity": 0.9, "schedule": "iterative"},
        {"sparsity": 0.9, "schedule": "cubic", "criterion": "movement", "training": TRAINING},
        {"sparsity": 0.9, "schedule": "cubic", "regrow": {}, "training": TRAINING},
        {"sparsity": 0.9, "layers": {"0": 0.5, "classifier.*": 0.95}, "exclude": ["embeddings.*"]},
    ],
)
def test_what_makes_sense_is_taken(fields: dict[str, Any]) -> None:
    step = Prune.model_validate(fields)
    assert Prune.model_validate_json(step.model_dump_json()) == step


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of sparsity and threshold"),
        ({"sparsity": 0.5, "threshold": 0.1}, "exactly one of sparsity and threshold"),
        ({"granularity": "4:2"}, "4:2 keeps N of every M"),
        ({"granularity": "2:2"}, "2:2 keeps N of every M"),
        ({"granularity": "2:99"}, "M 64 at most"),
        ({"granularity": "n:m"}, "pattern"),
        ({"granularity": "2:4", "sparsity": 0.5}, "states the sparsity"),
        ({"granularity": "2:4", "schedule": "cubic", "training": TRAINING}, "pruned at once"),
        ({"granularity": "2:4", "scope": "global"}, "in every layer alike"),
        ({"granularity": "block", "sparsity": 0.5}, "belong together"),
        ({"block": [1, 4], "sparsity": 0.5}, "belong together"),
        ({"block": [0, 4], "granularity": "block", "sparsity": 0.5}, "greater than or equal to 1"),
        ({"threshold": 0.1, "criterion": "taylor"}, "threshold is for criterion magnitude"),
        ({"threshold": 0.1, "schedule": "cubic", "training": TRAINING}, "grows towards a sparsity"),
        ({"sparsity": 0.5, "schedule": "cubic"}, "give training"),
        ({"sparsity": 0.5, "rewind": "weights", "training": TRAINING}, "rewind is for schedule iterative"),
        ({"sparsity": 0.5, "schedule": "iterative", "rewind": "weights"}, "with training"),
        ({"sparsity": 0.5, "criterion": "movement", "training": TRAINING}, "what one training finds"),
        ({"sparsity": 0.5, "criterion": "movement", "schedule": "cubic"}, "give training"),
        ({"sparsity": 0.5, "criterion": "variational", "training": TRAINING}, "what one training finds"),
        (
            {
                "sparsity": 0.5,
                "criterion": "variational",
                "schedule": "cubic",
                "training": {**TRAINING, "optimizer": "sgd"},
            },
            "one of adam, adamw, nadam, radam",
        ),
        ({"sparsity": 0.5, "criterion": "wanda", "scope": "global"}, "prunes at once"),
        ({"sparsity": 0.5, "criterion": "sparsegpt", "schedule": "cubic", "training": TRAINING}, "prunes at once"),
        ({"sparsity": 0.5, "criterion": "wanda", "granularity": "block", "block": [1, 4]}, "single weights or N:M"),
        ({"sparsity": 0.5, "regrow": {}}, "during one training"),
        ({"threshold": 0.5, "regrow": {}, "training": TRAINING}, "decides for good"),
        ({"sparsity": 0.5, "regrow": {}, "criterion": "wanda", "training": TRAINING}, "decides for good"),
        ({"sparsity": 0.5, "layers": {"0": 1.0}}, "less than 1"),
        ({"sparsity": 0.5, "criterion": "hessian"}, "magnitude"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Prune.model_validate(fields)
