"""How operations share threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from worker.threads import with_threads


def test_threads_are_as_before_behind_it() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), with_threads(before + 1):
        raise KeyError(torch.get_num_threads())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_that_wait_sleep_soon_unless_the_operator_says_otherwise(own: dict[str, str], expected: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    code = "import worker, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=env | own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
