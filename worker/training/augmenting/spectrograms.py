"""SpecAugment (Park et al. 2019): masked bands and stretches of spectrograms."""

from __future__ import annotations

import torch
from torch import Tensor

from app.contract.augmentable import Layout
from app.contract.augmentation import SpecAugment
from app.contract.errors import InvalidSpec
from worker.training.augmenting.draws import uniform, whole


def masked(features: Tensor, options: SpecAugment, layout: Layout, random: torch.Generator) -> Tensor:
    """Spectrograms float [batch, …, frequency, time] or [batch, …, time, frequency] with masks of their own.

    Masked places take the mean of the sample's sound, which is the zero of the paper where features are normalized.
    Padding takes no masks of time, and no part in the mean. Raises InvalidSpec for masks as wide as the spectrogram.
    """
    upright = features if layout == "frequency_time" else features.transpose(-1, -2)
    bands, frames = upright.shape[-2:]
    if options.frequency_masks and options.frequency_width >= bands:
        raise InvalidSpec(
            f"spec_augment has a frequency_width of {options.frequency_width}, and a batch {bands} bands: give less."
        )
    count = len(features)
    lengths = sounding(upright)
    whole_height = torch.full_like(lengths, bands)
    widest = (lengths * options.time_share).floor().clamp(max=options.time_width).long()
    narrow = torch.full_like(lengths, options.frequency_width)
    low = _stretches(options.frequency_masks, narrow, whole_height, bands, random)
    off = _stretches(options.time_masks, widest, lengths, frames, random)
    view = [count, *[1] * (features.ndim - 3)]
    hidden = low.view(*view, bands, 1) | off.view(*view, 1, frames)
    heard = (torch.arange(frames, device=features.device) < lengths[:, None]).view(*view, 1, frames)
    within = heard.expand(upright.shape).flatten(1)
    means = (upright.flatten(1) * within).sum(1) / within.sum(1).clamp(min=1)
    filled = torch.where(hidden & heard, means.view(*view, 1, 1).to(upright.dtype), upright)
    return filled if layout == "frequency_time" else filled.transpose(-1, -2)


def sounding(spectrograms: Tensor) -> Tensor:
    """How many frames of [batch, …, frequency, time] there are before the padding, int64 [batch].

    Padding is what extractors make of nothing: two frames or more at the end that are equal. A sample that is equal all
    over has no padding that could be told from it.
    """
    frames = spectrograms.shape[-1]
    other = (spectrograms != spectrograms[..., -1:]).flatten(1, -2).any(1)
    places = torch.arange(1, frames + 1, device=spectrograms.device)
    lengths = torch.where(other, places, 0).amax(1)
    return torch.where((lengths > 0) & (lengths < frames - 1), lengths, frames)


def _stretches(masks: int, widest: Tensor, lengths: Tensor, size: int, random: torch.Generator) -> Tensor:
    """bool [batch, size]: true in `masks` stretches of 0 to `widest` places, each within the first `lengths`."""
    count, device = len(lengths), lengths.device
    hidden = torch.zeros((count, size), dtype=torch.bool, device=device)
    if not masks:
        return hidden
    widths = whole(uniform(count * masks, random, device).view(count, masks), widest[:, None])
    starts = whole(uniform(count * masks, random, device).view(count, masks), lengths[:, None] - widths)
    places = torch.arange(size, device=device)
    within = (places >= starts[..., None]) & (places < (starts + widths)[..., None])
    return within.any(1)
