"""Batches: which samples come, in which order, and parts of them."""

from __future__ import annotations

import torch

from tests.worker.helpers import memory_data, mlp, tiny_model
from worker.data.batch import Batch
from worker.data.feed import Feed

COUNT = 10


def feed() -> Feed:
    inputs = torch.arange(COUNT, dtype=torch.float32)[:, None].expand(COUNT, 64).clone()
    return Feed(tiny_model(mlp()), memory_data({"train": (inputs, torch.arange(COUNT))}))


def drawn(skip: int, limit: int | None = None) -> list[list[int]]:
    order = torch.Generator().manual_seed(3)
    found = []
    for batch in feed().batches("train", 4, shuffle=order, skip=skip, limit=limit):
        assert batch.targets is not None
        assert torch.equal(batch.inputs[0][:, 0].long(), batch.targets)
        found.append(batch.targets.tolist())
    return found


def test_batches_that_are_skipped_leave_the_order_as_it_is() -> None:
    whole = drawn(0)
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert sorted(sample for batch in whole for sample in batch) == list(range(COUNT))
    assert [drawn(skip) for skip in (1, 2, 3, 9)] == [whole[1:], whole[2:], [], []]
    assert drawn(1, limit=6) == [whole[1][:2]]


def test_a_part_of_a_batch_has_everything_of_its_samples() -> None:
    batch = Batch((torch.arange(6).reshape(3, 2), torch.tensor([7, 8, 9])), torch.tensor([0, 1, 2]), ["a", "b", "c"])
    part = batch.part([2, 0])
    assert [tensor.tolist() for tensor in part.inputs] == [[[4, 5], [0, 1]], [9, 7]]
    assert part.targets is not None
    assert (part.targets.tolist(), part.references) == ([2, 0], ["c", "a"])
    bare = Batch((torch.zeros(3, 1),), None).part([1])
    assert (len(bare), bare.targets, bare.references) == (1, None, None)
