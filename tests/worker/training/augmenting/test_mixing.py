"""Mixed samples: inputs and labels in the same shares, and the loss that the papers state."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from app.contract.augmentation import Cutmix, Mixup
from worker.data.batch import Batch
from worker.training import losses
from worker.training.augmenting.mixing import mixed

COUNT, CLASSES = 300, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures() -> Batch:
    """Each picture is of one value, its number, so that what it was mixed of can be read."""
    values = torch.arange(COUNT, dtype=torch.float32)
    targets = torch.randint(CLASSES, (COUNT,), generator=generator(1))
    return Batch((values[:, None, None, None].expand(-1, 2, 6, 8).clone(),), targets, indices=tuple(range(COUNT)))


def test_mixup_mixes_inputs_and_labels_in_the_same_shares() -> None:
    batch = pictures()
    assert batch.targets is not None
    found = mixed(batch, Mixup(alpha=0.5, probability=0.6), None, CLASSES, generator())
    assert found.targets is not None
    assert found.indices is None
    partners = torch.randperm(COUNT, generator=generator())
    values = found.inputs[0][:, 0, 0, 0]
    own, other = torch.arange(COUNT, dtype=torch.float32), partners.float()
    share = torch.where(own == other, torch.ones(COUNT), (values - other) / (own - other))
    assert torch.allclose(found.inputs[0], values[:, None, None, None].expand(-1, 2, 6, 8), atol=1e-3)
    assert float(((share > 0.999).float()).mean()) == pytest.approx(0.4, abs=0.12)
    one_hot = functional.one_hot(batch.targets, CLASSES).float()
    expected = share[:, None] * one_hot + (1 - share[:, None]) * one_hot[partners]
    assert torch.allclose(found.targets, expected, atol=2e-3)
    assert torch.allclose(found.targets.sum(1), torch.ones(COUNT))


def test_cutmix_labels_go_by_area() -> None:
    batch = pictures()
    assert batch.targets is not None
    found = mixed(batch, None, Cutmix(probability=0.7), CLASSES, generator())
    assert found.targets is not None
    partners = torch.randperm(COUNT, generator=generator())
    pixels = found.inputs[0][:, 0]
    kept = pixels == torch.arange(COUNT)[:, None, None]
    assert ((pixels == partners[:, None, None]) | kept).all()
    share = kept.float().mean((1, 2))
    for one in ~kept:
        assert torch.equal(one, one.any(1)[:, None] & one.any(0))
    one_hot = functional.one_hot(batch.targets, CLASSES).float()
    expected = share[:, None] * one_hot + (1 - share[:, None]) * one_hot[partners]
    assert torch.allclose(found.targets, expected, atol=1e-5)
    assert 0.1 < float((share < 1).float().mean()) <= 0.75


def test_several_labels_are_mixed_themselves_and_masks_show_both() -> None:
    values = torch.randn((8, 5), generator=generator())
    mask = (torch.arange(5) < torch.arange(1, 9)[:, None].clamp(max=5)).long()
    labels = (torch.rand((8, 3), generator=generator()) > 0.5).float()
    found = mixed(Batch((values, mask), labels), Mixup(alpha=5.0), None, 3, generator())
    partners = torch.randperm(8, generator=generator())
    assert torch.equal(found.inputs[1], torch.maximum(mask, mask[partners]))
    assert found.targets is not None
    assert ((found.targets >= 0) & (found.targets <= 1)).all()
    assert torch.equal(found.targets[labels == labels[partners]], labels[labels == labels[partners]])


def test_without_labels_inputs_alone_are_mixed() -> None:
    batch = pictures()
    found = mixed(Batch(batch.inputs, None), Mixup(), None, CLASSES, generator())
    assert found.targets is None
    assert not torch.equal(found.inputs[0], batch.inputs[0])


def test_the_loss_of_mixed_labels_is_that_of_the_paper() -> None:
    """lambda * CE(own) + (1 - lambda) * CE(partner's), Zhang et al. 2017."""
    logits = torch.randn((4, CLASSES), generator=generator())
    own, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 2, 1])
    share = torch.tensor([1.0, 0.7, 0.2, 0.5])
    soft = share[:, None] * functional.one_hot(own, CLASSES) + (1 - share[:, None]) * functional.one_hot(other, CLASSES)
    each = share * functional.cross_entropy(logits, own, reduction="none")
    each += (1 - share) * functional.cross_entropy(logits, other, reduction="none")
    assert float(losses.cross_entropy(logits, soft)) == pytest.approx(float(each.mean()), rel=1e-6)


def test_smoothed_labels_by_hand() -> None:
    logits, targets = torch.randn((6, CLASSES), generator=generator()), torch.tensor([0, 4, -100, 2, 2, 1])
    found = losses.cross_entropy(logits, targets, 0.1)
    likely = logits.log_softmax(1)
    counts = targets != -100
    own = likely[torch.arange(6), targets.clamp(min=0)]
    expected = -(0.9 * own + 0.1 * likely.mean(1))[counts].mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
