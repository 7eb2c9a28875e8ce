"""Real programs with their JSON spoiled anywhere: each loads or is refused, and none takes much memory."""

from __future__ import annotations

import copy
import json
import logging
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from app.contract.errors import ModelRejected
from tests.worker.loading.programs import CONSTANTS, MODEL, WEIGHTS, ConvNet, exported, image, load, packed, unpacked
from tests.worker.nets import Recurrent
from worker.vetting.operators import ATEN

MUTATIONS = 200  # a program; the seeds are fixed, so that a failure is one for everybody
ACTIVATION_BYTES = 64 << 20  # in place of gigabytes, which a mutation may rightly ask for
GROWTH_BYTES = 1 << 30

VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 70),
    *(0.0, -0.5, 1e308, "NaN", "Infinity", True, False, None),
    *("", "x", "s0", "same", "__import__('os')", "../../x", "weight_0", "torch.ops.aten.add.Tensor", "_operator.mul"),
    *([], {}, [1], [[]], {"as_int": 3}, {"as_none": True}, {"as_tensor": {"name": "x"}}, {"as_bool": True}),
)
OPERATORS = sorted(f"torch.ops.aten.{name}.default" for name in ATEN)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def mutate(tree: Any, rng: random.Random) -> None:
    found = places(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(found)
        other, other_key = rng.choice(found)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                holder[key] = copy.deepcopy(other[other_key]) if _has(other, other_key) else None
            case 3 if _has(holder, key):
                del holder[key]
            case 4 if isinstance(holder, list):
                holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice(holder or [None])))
            case _:
                nodes = [place for place in found if place[1] == "target"]
                holder, key = rng.choice(nodes) if nodes else (holder, key)
                holder[key] = rng.choice(OPERATORS)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def spoiled(files: dict[str, bytes], seed: int) -> bytes:
    rng = random.Random(seed)
    name = rng.choice((MODEL, MODEL, MODEL, WEIGHTS, CONSTANTS))
    tree = json.loads(files[name])
    try:
        mutate(tree, rng)
    except (IndexError, KeyError, TypeError):  # an earlier mutation took the place of a later one away
        return packed(files | {name: b"{}"})
    return packed(files | {name: json.dumps(tree).encode()})


def programs() -> dict[str, bytes]:
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    return {
        "convolutions": exported(ConvNet().eval(), image()),
        "recurrent": exported(Recurrent(torch.nn.LSTM).eval(), ids),
    }


@pytest.mark.parametrize("name", ["convolutions", "recurrent"])
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch exports recurrent layers with a word about it
def test_a_spoiled_program_loads_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("worker.loading.program_check.MAX_ACTIVATION_BYTES", ACTIVATION_BYTES)
    logging.disable(logging.WARNING)  # what was not foreseen is logged with its traceback
    files = unpacked(programs()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = 0
    try:
        for seed in range(MUTATIONS):
            detail = None
            try:
                load(spoiled(files, seed), tmp_path / "in")
                loaded += 1
            except ModelRejected as refused:
                detail = refused.detail
            assert detail is None or (len(detail) > 20 and str(tmp_path) not in detail), seed
    finally:
        logging.disable(logging.NOTSET)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["upload.pt2"]
    # Some hit what nobody reads; most hit what is checked.
    assert 0 < loaded < MUTATIONS / 2
