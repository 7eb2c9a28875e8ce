"""What processes do together, and BatchNorm over all of them against torch's on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.worker.ranks import works
from tests.worker.ranks.together import together


def test_collectives(tmp_path: Path) -> None:
    for rank, found in enumerate(together(3, tmp_path, works.collectives)):
        assert found["total"].tolist() == [3.0, 3.0]
        assert found["gathered"].tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
        assert found["listed"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["told"] == "by 0"
        assert found["alike"].tolist() == [0.0, 1.0]
        assert found["first"] is (rank == 0)


def test_a_process_alone_needs_nobody(tmp_path: Path) -> None:
    (found,) = together(1, tmp_path, works.collectives)
    assert found["total"].tolist() == [0.0, 1.0]
    assert found["gathered"].tolist() == [[0.0, 1.0]]
    assert (found["listed"], found["told"], found["first"]) == ([{"rank": 0}], "by 0", True)


@pytest.mark.parametrize(("by", "said"), [(0.0, "the same"), (1e-6, "different weights"), (float("nan"), "the same")])
def test_processes_that_went_astray_are_noticed(by: float, said: str, tmp_path: Path) -> None:
    assert all(said in found for found in together(2, tmp_path, works.astray, by))


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 4), (7, 3, 4, 4)], ids=["rows", "sequences", "pictures"])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [6, 1, 0]], ids=str)
def test_batch_norm_is_that_of_the_whole_batch(shape: tuple[int, ...], sizes: list[int], tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs, above = 100 + torch.randn(shape), torch.randn(shape)  # far from zero, where sums of squares lose digits
    found = together(len(sizes), tmp_path, works.batch_norm, inputs, above, sizes)

    whole = inputs.double().requires_grad_()
    weight, bias = (
        torch.linspace(*ends, shape[1], dtype=torch.float64).requires_grad_() for ends in ((0.5, 2.0), (-1.0, 1.0))
    )
    mean, variance = torch.zeros(shape[1], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    outputs = functional.batch_norm(whole, mean, variance, weight, bias, training=True, momentum=1.0, eps=1e-5)
    outputs.backward(above.double())
    values = inputs.numel() // shape[1]

    def close(ours: torch.Tensor, theirs: torch.Tensor | None) -> None:
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs.detach(), atol=2e-4, rtol=1e-4)

    close(torch.cat([one[0] for one in found]), outputs)
    close(torch.cat([one[1] for one in found]), whole.grad)
    for one in found:
        close(one[2], mean)
        close(one[3] * values / (values - 1), variance)
        assert one[4].tolist() == [values] * shape[1]
        close(one[5], weight.grad)
        close(one[6], bias.grad)


def test_processes_that_take_turns_come_to_the_metrics_of_one(tmp_path: Path) -> None:
    """Of five batches, with three processes; all get all of it."""
    (expected,) = together(1, tmp_path / "1", works.judged, "validation")
    found = together(3, tmp_path / "3", works.judged, "validation")
    assert found[0]["classes"].samples == 250
    assert len(found[0]["classes"].others) == 5
    for one in found:
        for task, own in expected.items():
            assert one[task].value == pytest.approx(own.value, rel=1e-12)
            assert one[task].samples == own.samples
            assert one[task].others == pytest.approx(own.others, abs=1e-6)
