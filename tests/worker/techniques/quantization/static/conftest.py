from __future__ import annotations

import pytest

from tests.worker.techniques.quantization.static.graphs import reseed


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    reseed()
