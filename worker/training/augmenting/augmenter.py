"""What becomes of a batch of a training before the student, and its teacher, see it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from app.contract.augmentable import Layout, layout_of
from app.contract.augmentation import Augmentation
from app.contract.errors import InvalidSpec
from app.contract.facts import ModelFacts
from app.contract.training import Training
from worker.data.batch import Batch
from worker.techniques.base import Details
from worker.training.augmenting.mixing import mixed
from worker.training.augmenting.pictures import cropped, erased, flipped, jittered
from worker.training.augmenting.spectrograms import masked


class Augmenter:
    """Changes batches as a training asks, on the device, by numbers of one generator.

    The first input is the picture or the spectrogram; the others, if any, say what of it counts.
    """

    def __init__(self, training: Training, facts: ModelFacts, device: torch.device) -> None:
        self._asked, self._smoothing = training.augmentation, training.label_smoothing
        self._classes, self._device = facts.classes, device
        self._layout = _layout(self._asked, facts)
        self.fixed = self._asked is None
        """Whether inputs stay as they are."""

    def __call__(self, batch: Batch, random: torch.Generator) -> Batch:
        """The batch that is learned from; its smoothing is part of it. Raises InvalidSpec for what does not fit it."""
        batch = replace(batch, smoothing=self._smoothing)
        asked = self._asked
        if asked is None:
            return batch
        batch = batch.to(self._device)
        first = self._changed(batch.inputs[0], asked, random)
        batch = replace(batch, inputs=(first, *batch.inputs[1:]), indices=None)
        if asked.mixup is None and asked.cutmix is None:
            return batch
        return mixed(batch, asked.mixup, asked.cutmix, self._classes, random)

    def details(self) -> Details:
        """For the report of a step."""
        found: Details = {}
        if self._asked is not None:
            found["training_augmentation"] = ", ".join(self._asked.named)
        if self._layout is not None:
            found["training_spectrograms"] = self._layout.replace("_", ", ")
        if self._smoothing:
            found["training_label_smoothing"] = self._smoothing
        return found

    def _changed(self, first: Tensor, asked: Augmentation, random: torch.Generator) -> Tensor:
        if asked.crop is not None:
            first = cropped(first, asked.crop, random)
        if asked.flip is not None:
            first = flipped(first, asked.flip, random)
        if asked.jitter is not None:
            first = jittered(first, asked.jitter, random)
        if asked.erase is not None:
            first = erased(first, asked.erase, random)
        if asked.spec_augment is not None and self._layout is not None:
            first = masked(first, asked.spec_augment, self._layout, random)
        return first


def _layout(asked: Augmentation | None, facts: ModelFacts) -> Layout | None:
    """Of spectrograms, where they are masked. Raises InvalidSpec where neither sizes nor client say it."""
    if asked is None or asked.spec_augment is None:
        return None
    layout = layout_of(asked.spec_augment, facts.inputs[0].shape)
    if layout is None:
        raise InvalidSpec("spec_augment needs the layout of the spectrograms: frequency_time or time_frequency.")
    return layout
