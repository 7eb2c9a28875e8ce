"""The compress step on real digits: it holds the metric, stops at the last that did, and goes on after a kill."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.augmentation import Augmentation, Flip
from app.contract.compression import Compress
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, memory_data, mlp, tiny_model
from worker.checkpoints.points import Checkpoints, Kind
from worker.constraints import baked, masks
from worker.context import Context
from worker.data.base import Data
from worker.packed import packed
from worker.techniques.base import Details
from worker.techniques.compression.compress import CompressTechnique, _Place, moved
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.training.loop import train

BRIEF = Training(steps=150, batch_size=64, lr=3e-3, schedule="cosine")


@pytest.fixture(scope="module")
def digits() -> Data:
    """With a validation split of 200."""
    raw = digits_data().splits["train"].read(range(1000))
    assert isinstance(raw.inputs, dict)
    assert isinstance(raw.targets, Tensor)
    x, y = raw.inputs["input"], raw.targets
    return memory_data({"train": (x[:800], y[:800]), "validation": (x[800:], y[800:])})


@pytest.fixture(scope="module")
def trained(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    context = context_for(tiny_model(mlp()), digits, tmp_path_factory.mktemp("trained"))
    train(context, Training(epochs=10, lr=3e-3))
    return context.model.module


@pytest.fixture
def context(trained: nn.Module, digits: Data, tmp_path: Path) -> Context:
    return context_for(tiny_model(copy.deepcopy(trained)), digits, tmp_path)


def compress(context: Context, **fields: Any) -> Details:
    return CompressTechnique().apply(Compress(**{"training": BRIEF, "patience": 1, "rounds": 6} | fields), context)


def accuracy(context: Context, module: nn.Module) -> float:
    assert context.feed is not None
    return context.feed.score(lambda inputs: module(*inputs), "validation")[0]


def size(module: nn.Module) -> int:
    return len(packed(module.state_dict())[0])


def test_it_lowers_bytes_and_holds_the_metric(context: Context) -> None:
    uploaded = context.teacher
    details = compress(context, rounds=12)
    module = baked(context.model.module)
    assert details["held"]
    assert accuracy(context, module) >= accuracy(context, uploaded) == details["wanted_validation_metric"]
    assert details["packed_bytes"] == size(module) < size(uploaded) / 8
    rows = details["rounds"]
    assert isinstance(rows, list)
    assert rows[-1]["holds"] == 0
    held = [row for row in rows if row["holds"] == (2 if details["held_by_margin"] else 1)]
    assert min(row["packed_bytes"] for row in held) == details["packed_bytes"]  # type: ignore[type-var]


def test_a_drop_that_is_allowed_makes_it_smaller(context: Context, trained: nn.Module) -> None:
    strict = compress(context)
    loose_context = context_for(tiny_model(copy.deepcopy(trained)), context.feed.data, context.scratch)  # type: ignore[union-attr]
    loose = compress(loose_context, max_accuracy_drop=0.1)
    assert loose["packed_bytes"] < strict["packed_bytes"]  # type: ignore[operator]
    assert accuracy(loose_context, baked(loose_context.model.module)) >= accuracy(context, context.teacher) - 0.1


def test_rounds_behind_the_way_down_train_longer(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int | None]] = []
    for technique in (PruneTechnique, QuantizeTechnique):
        monkeypatch.setattr(technique, "apply", _noted(technique, steps))
    details = compress(context, keep=0.02, factor=0.5, patience=1, rounds=4, longer=2)
    times = [row["times_as_long"] for row in details["rounds"]]  # type: ignore[union-attr, index]
    assert times == [1, *[2] * (len(times) - 1)]  # so few weights do not hold
    assert len(times) > 1
    assert steps == [
        (name, count * own) for own in times for name, count in (("PruneTechnique", 150), ("QuantizeTechnique", 75))
    ]


def _noted(technique: type[Any], steps: list[tuple[str, int | None]]) -> Callable[..., Details]:
    apply = technique.apply

    def noted(self: Any, step: Any, context: Context) -> Details:
        if step.training is not None:
            steps.append((technique.__name__, step.training.steps))
        return apply(self, step, context)  # type: ignore[no-any-return]

    return noted


def test_where_nothing_holds_the_upload_is_left_as_it_was(context: Context) -> None:
    before = copy.deepcopy(context.model.module.state_dict())
    with torch.no_grad():
        details = None
    context.teacher = Perfect(context)  # type: ignore[assignment]
    details = compress(context, rounds=2, keep=0.01, training=Training(steps=1, lr=1e-6))
    assert details["held"] is False
    assert details["packed_bytes"] is None
    assert masks(context.model.module) == {}
    after = context.model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("shape", "fields", "padding"),
    [
        ((1, 8, 8), {}, 1),
        ((1, 8, 8), {"shift": 3}, 3),
        ((1, 8, 8), {"shift": 0}, None),
        ((1, 8, 8), {"shift": 8}, None),  # a picture has to be larger
        ((64,), {}, None),
    ],
)
def test_pictures_are_moved_and_nothing_else_is(
    shape: tuple[int, ...], fields: dict[str, int], padding: int | None
) -> None:
    augmentation = moved(Compress(**fields), tiny_model(mlp(), shape=shape)).augmentation  # type: ignore[arg-type]
    assert (augmentation and augmentation.crop and augmentation.crop.padding) == padding


def test_an_augmentation_that_is_asked_for_stays() -> None:
    asked = Training(steps=1, augmentation=Augmentation(flip=Flip()))
    assert moved(Compress(training=asked), tiny_model(mlp(), shape=(1, 8, 8))) == asked


class Perfect(nn.Module):
    """Knows all the answers."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        assert context.feed is not None
        batch = next(iter(context.feed.batches("validation", 300)))
        assert batch.targets is not None
        self.known = {
            tuple(row.tolist()): int(target) for row, target in zip(batch.inputs[0], batch.targets, strict=True)
        }

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.eye(10)[[self.known.get(tuple(row.tolist()), 0) for row in inputs]]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [1, 3])
def test_after_a_kill_it_goes_on_with_the_round_and_ends_with_equal_bits(
    context: Context, trained: nn.Module, digits: Data, tmp_path: Path, after: int
) -> None:
    expected = compress(context, rounds=4, patience=4)
    saved: dict[str, Path] = {}
    first = context_for(tiny_model(copy.deepcopy(trained)), digits, tmp_path)

    def announce(kind: Kind, name: str) -> None:
        saved[kind] = Path(shutil.copy(tmp_path / name, tmp_path / f"stored-{kind}"))

    first.checkpoints = Checkpoints(tmp_path, announce, 0.0)
    seen: set[int] = set()

    def count(share: float) -> None:
        seen.add(int(share * 4 + 1e-9))
        if share * 4 > after + 0.4:
            raise Killed

    first.progress = count
    with pytest.raises(Killed):
        compress(first, rounds=4, patience=4)
    assert saved
    second = context_for(tiny_model(copy.deepcopy(trained)), digits, tmp_path)
    second.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    shares: list[float] = []
    second.progress = shares.append
    assert compress(second, rounds=4, patience=4) == expected
    assert min(shares) > after / 4  # the rounds before were not taken again
    ours, theirs = (baked(one.model.module).state_dict() for one in (second, context))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("was_firm", "size", "firm", "better"),
    [
        (True, 66, False, True),
        (True, 67, False, False),
        (True, 99, True, True),
        (False, 149, True, True),
        (False, 150, True, False),
        (False, 99, False, True),
        (False, 100, False, False),
    ],
)
def test_the_margin_is_worth_half_as_many_bytes_again(was_firm: bool, size: int, firm: bool, better: bool) -> None:
    assert _Place(0.5, 0.5, size=100, firm=was_firm).better(size, firm) == better


def test_the_first_round_that_holds_is_the_best_so_far() -> None:
    assert _Place(0.5, 0.5).better(10**9, firm=False)


def test_finer_values_are_tried_where_sharing_is_all_that_a_round_fails_by(context: Context) -> None:
    """With two values a layer fewer rounds hold than with up to sixteen; what holds with few takes no more."""
    coarse = compress(context, entries=2, most_entries=2, rounds=2, max_accuracy_drop=0.02)
    fine = compress(fresh(context), entries=2, most_entries=16, rounds=2, max_accuracy_drop=0.02)
    rows = {"coarse": coarse["rounds"], "fine": fine["rounds"]}
    assert all(row["entries"] == 2 for row in rows["coarse"])  # type: ignore[union-attr]
    tried = [row["entries"] for row in rows["fine"]]  # type: ignore[union-attr]
    assert max(tried) > 2
    wanted = fine["wanted_validation_metric"]
    for row in rows["fine"]:  # type: ignore[union-attr]
        if row["entries"] > 2:
            assert row["validation_metric_pruned"] >= wanted
    assert sum(row["holds"] > 0 for row in rows["fine"]) > sum(row["holds"] > 0 for row in rows["coarse"])  # type: ignore[union-attr]


def fresh(context: Context) -> Context:
    return context_for(tiny_model(copy.deepcopy(context.teacher)), context.feed.data, context.scratch)  # type: ignore[union-attr]
