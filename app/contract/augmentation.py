"""What is changed at random in the samples that a training sees. Part of `Training`.

Nothing of it touches validation, calibration, or what the report measures.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.strict import Strict

Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, lt=1)]
Aspect = Annotated[float, Field(gt=0, le=100)]
Alpha = Annotated[float, Field(gt=0, le=100, description="Shares are drawn from Beta(alpha, alpha).")]


class Flip(Strict):
    """Mirrors a picture, each way with its own probability."""

    horizontal: Annotated[Probability, Field(description="Probability that left and right are exchanged.")] = 0.5
    vertical: Annotated[Probability, Field(description="Probability that top and bottom are exchanged.")] = 0.0

    @model_validator(mode="after")
    def _some(self) -> Flip:
        if self.horizontal == self.vertical == 0:
            raise ValueError("flip with both probabilities 0 does nothing: leave it out")
        return self


class Crop(Strict):
    """Pads a picture on every side and cuts a window of the old size out of it at random: a shift."""

    padding: Annotated[int, Field(ge=1, le=1024, description="Pixels on each side, fewer than the picture has.")] = 4
    fill: Literal["zero", "edge", "reflect"] = Field(
        "zero", description="What the padding shows: zeros, the nearest pixel, or the picture mirrored at its edge."
    )


class Erase(Strict):
    """Random erasing (Zhong et al. 2017): a rectangle of a picture is painted over.

    Cutout (DeVries & Taylor 2017) is `probability` 1, `aspect` [1, 1] and an `area` of two equal numbers.
    """

    probability: Annotated[float, Field(gt=0, le=1, description="That a picture is painted over.")] = 0.5
    area: tuple[Area, Area] = Field((0.02, 0.33), description="Least and largest share of the picture that goes.")
    aspect: tuple[Aspect, Aspect] = Field((0.3, 3.3), description="Least and largest height over width.")
    fill: Literal["mean", "zero", "noise"] = Field(
        "mean", description="With each channel's mean of the picture, with zeros, or with noise of its mean and spread."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Erase:
        for name in ("area", "aspect"):
            least, largest = getattr(self, name)
            if least > largest:
                raise ValueError(f"{name} is [least, largest]; it is [{least:g}, {largest:g}]")
        return self


class Jitter(Strict):
    """Other light: brightness, contrast and saturation change, in this order, however a picture was normalized."""

    brightness: Annotated[
        Amount, Field(description="Up to this many of the picture's standard deviations are added or taken off.")
    ] = 0.2
    contrast: Annotated[
        Amount, Field(description="Differences to the picture's mean are scaled by a factor of 1 - this to 1 + this.")
    ] = 0.2
    saturation: Annotated[
        Amount, Field(description="The same for a pixel's differences to its grey; for pictures of three channels.")
    ] = 0.0

    @model_validator(mode="after")
    def _some(self) -> Jitter:
        if self.brightness == self.contrast == self.saturation == 0:
            raise ValueError("jitter with nothing to change does nothing: leave it out")
        return self


class Mixup(Strict):
    """Mixes a sample with another one of its batch, and their labels in the same shares (Zhang et al. 2017)."""

    alpha: Alpha = 0.2
    probability: Annotated[float, Field(gt=0, le=1, description="That a sample is mixed.")] = 1.0


class Cutmix(Strict):
    """Puts a rectangle of another picture into a picture, and mixes labels by area (Yun et al. 2019)."""

    alpha: Alpha = 1.0
    probability: Annotated[float, Field(gt=0, le=1, description="That a picture is mixed.")] = 0.5


class SpecAugment(Strict):
    """Masks bands and stretches of a spectrogram with its mean (Park et al. 2019), without warping.

    Widths are drawn from 0 to the given ones. Masks of time lie in the sound: frames at the end that are all alike are
    taken for padding.
    """

    frequency_masks: Annotated[int, Field(ge=0, le=20, description="How many masks of bands.")] = 2
    frequency_width: Annotated[
        int, Field(ge=1, le=4096, description="Most bands of one mask, fewer than there are.")
    ] = 27
    time_masks: Annotated[int, Field(ge=0, le=100, description="How many masks of frames.")] = 2
    time_width: Annotated[int, Field(ge=1, le=65_536, description="Most frames of one mask.")] = 100
    time_share: Annotated[float, Field(gt=0, le=1, description="Most of a sound that one mask of time takes.")] = 0.2
    layout: Literal["auto", "frequency_time", "time_frequency"] = Field(
        "auto",
        description="Order of the input's last two dimensions. auto: the shorter of two fixed ones, or the fixed one "
        "beside an open one, is frequency.",
    )

    @model_validator(mode="after")
    def _some(self) -> SpecAugment:
        if self.frequency_masks == self.time_masks == 0:
            raise ValueError("spec_augment without masks does nothing: leave it out")
        return self


class Augmentation(Strict):
    """Random changes of training samples, in this order. Another seed draws others; a resumed training the same."""

    crop: Crop | None = None
    flip: Flip | None = None
    jitter: Jitter | None = None
    erase: Erase | None = None
    spec_augment: SpecAugment | None = None
    mixup: Mixup | None = None
    cutmix: Cutmix | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """Those that are asked for, in the order in which they happen."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _consistent(self) -> Augmentation:
        if not self.named:
            raise ValueError(f"augmentation names nothing; there are {', '.join(type(self).model_fields)}")
        if self.mixup is not None and self.cutmix is not None:
            both = self.mixup.probability + self.cutmix.probability
            if both > 1:
                raise ValueError(
                    f"a sample is mixed in one way: the probabilities of mixup and cutmix add up to {both:g}, at most 1"
                )
        return self
