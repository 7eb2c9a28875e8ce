"""What the service offers is what the worker can do."""

from __future__ import annotations

import pytest

from app.contract import catalogue
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.registry import TECHNIQUES, table


def test_the_registry_has_the_catalogues_names() -> None:
    assert TECHNIQUES.keys() == catalogue.BY_NAME.keys()


def test_every_entry_answers_to_its_own_name() -> None:
    assert {name: technique.name for name, technique in TECHNIQUES.items()} == {name: name for name in TECHNIQUES}


def test_two_techniques_of_one_name_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="share the name prune"):
        table((PruneTechnique(), PruneTechnique()))
