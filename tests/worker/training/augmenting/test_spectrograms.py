"""Masks of spectrograms: where they lie, how wide they are, and what is in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.contract.augmentation import SpecAugment
from app.contract.errors import InvalidSpec
from worker.training.augmenting.spectrograms import masked, sounding

COUNT, BANDS, FRAMES = 200, 16, 50
OPTIONS = SpecAugment(frequency_masks=1, frequency_width=5, time_masks=2, time_width=30, time_share=0.2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sounds(lengths: Tensor | None = None) -> Tensor:
    """[batch, bands, frames], of which those behind the end are all alike."""
    found = torch.randn((COUNT, BANDS, FRAMES), generator=generator(1))
    return found if lengths is None else torch.where(torch.arange(FRAMES) < lengths[:, None, None], found, -1.5)


def test_masks_are_bands_and_stretches_within_their_widths() -> None:
    before = sounds()
    found = masked(before, OPTIONS, "frequency_time", generator())
    hidden = found != before
    bands, frames = hidden.all(2), hidden.all(1)
    assert torch.equal(hidden, bands[:, :, None] | frames[:, None, :])
    assert int(bands.sum(1).max()) == 5
    assert int(frames.sum(1).max()) <= 2 * 10  # two masks of a fifth of the sound
    assert int(frames.sum(1).max()) > 10
    assert float(bands.sum(1).float().mean()) == pytest.approx(2.5, abs=0.4)
    assert len({row.numpy().tobytes() for row in bands}) > 30


def test_masked_places_take_the_mean_of_the_sound() -> None:
    before = sounds()
    found = masked(before, OPTIONS, "frequency_time", generator())
    for one, was in zip(found, before, strict=True):
        changed = one[one != was]
        if len(changed):
            assert changed == pytest.approx(float(was.mean()), abs=1e-5)


def test_the_other_layout_is_the_transpose() -> None:
    before = sounds()
    one = masked(before, OPTIONS, "frequency_time", generator(7))
    other = masked(before.transpose(1, 2).contiguous(), OPTIONS, "time_frequency", generator(7))
    assert torch.equal(one, other.transpose(1, 2))


def test_a_channel_dimension_is_masked_as_one() -> None:
    before = sounds()[:, None].repeat(1, 2, 1, 1)
    found = masked(before, OPTIONS, "frequency_time", generator())
    assert torch.equal(found[:, 0] != before[:, 0], found[:, 1] != before[:, 1])


def test_padding_takes_no_masks_of_time_and_no_part_in_the_mean() -> None:
    lengths = torch.arange(COUNT) % 30 + 10
    before = sounds(lengths)
    assert torch.equal(sounding(before), lengths)
    only_time = SpecAugment(frequency_masks=0, time_masks=2, time_width=30, time_share=0.5)
    found = masked(before, only_time, "frequency_time", generator())
    behind = torch.arange(FRAMES) >= lengths[:, None, None]
    assert torch.equal(found[behind.expand_as(found)], before[behind.expand_as(before)])
    for one, was, length in zip(found, before, lengths, strict=True):
        changed = one[one != was]
        if len(changed):
            assert changed == pytest.approx(float(was[:, :length].mean()), abs=1e-5)


def test_masks_as_wide_as_the_spectrogram_are_refused() -> None:
    with pytest.raises(InvalidSpec, match="16 bands"):
        masked(sounds(), SpecAugment(frequency_width=16), "frequency_time", generator())


def test_equal_numbers_give_equal_masks() -> None:
    one, same, other = (masked(sounds(), OPTIONS, "frequency_time", generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
