"""Whether the samples of a model can be augmented as a training asks, and its labels smoothed."""

from __future__ import annotations

from typing import Literal

from app.contract.augmentation import Augmentation, SpecAugment
from app.contract.errors import DatasetMismatch, InvalidSpec, Unsupported
from app.contract.facts import DataKind, DatasetFacts, Dimension, ModelFacts, Task, TensorFacts
from app.contract.tasks import TASKS
from app.contract.training import Training

Layout = Literal["frequency_time", "time_frequency"]

MASK = "attention_mask"
DECODER_IDS = "decoder_input_ids"  # what an encoder-decoder has and a CTC model has not
OF_PICTURES = ("crop", "flip", "jitter", "erase", "cutmix")
GEOMETRIC = ("crop", "flip")
MIXING = ("mixup", "cutmix")
PICTURE_TASKS: tuple[Task, ...] = ("image-classification", "multi-label", "regression")
SOUND_TASKS: tuple[Task, ...] = ("audio-classification", "speech-recognition", "multi-label", "regression")
# Their targets are classes of the model, or shares of them: any mixture of two is a target too.
MIXED_TASKS: tuple[Task, ...] = ("image-classification", "text-classification", "audio-classification", "multi-label")
SMOOTHED_TASKS: tuple[Task, ...] = (
    *MIXED_TASKS,
    "token-classification",
    "causal-lm",
    "masked-lm",
    "speech-recognition",
)
_MOST_CHANNELS = 4  # of a picture; more in the last dimension is a width


def check_augmentable(training: Training, model: ModelFacts, dataset: DatasetFacts | None, pointer: str) -> None:
    """Raises Unsupported, InvalidSpec or DatasetMismatch, each at its field; `pointer` is the training's."""
    if training.label_smoothing:
        _check_smoothing(model, dataset, f"{pointer}/label_smoothing")
    augmentation = training.augmentation
    if augmentation is None:
        return
    kind = None if dataset is None else dataset.kind
    for name in augmentation.named:
        field = f"{pointer}/augmentation/{name}"
        if name in OF_PICTURES:
            _check_pictures(name, model, kind, field)
        if name in MIXING:
            _check_mixing(name, model, field)
    _check_sizes(augmentation, model, f"{pointer}/augmentation")
    if augmentation.spec_augment is not None:
        _check_spectrograms(augmentation.spec_augment, model, kind, f"{pointer}/augmentation/spec_augment")


def layout_of(options: SpecAugment, shape: tuple[Dimension, ...]) -> Layout | None:
    """Which of an input's last two dimensions is which; None where `auto` cannot tell. `shape` is without the batch."""
    if options.layout != "auto":
        return options.layout
    first, second = shape[-2:]
    if first == second:
        return None
    if first is None or second is None:
        return "time_frequency" if first is None else "frequency_time"
    return "frequency_time" if first < second else "time_frequency"


def _check_smoothing(model: ModelFacts, dataset: DatasetFacts | None, pointer: str) -> None:
    if model.task not in SMOOTHED_TASKS:
        raise Unsupported(
            f"label_smoothing spreads a target over classes, and a {model.task} model learns from none.",
            pointer=pointer,
        )
    if model.task == "speech-recognition" and all(tensor.name != DECODER_IDS for tensor in model.inputs):
        raise Unsupported(
            "label_smoothing is for a class a position; connectionist temporal classification (CTC) has targets of "
            "no position.",
            pointer=pointer,
        )
    train = None if dataset is None else dataset.splits.get("train")
    if train is not None and not TASKS[model.task].labelled(train.targets):
        raise DatasetMismatch("label_smoothing needs labels, and the `train` split has none.", pointer=pointer)


def _check_pictures(name: str, model: ModelFacts, kind: DataKind | None, pointer: str) -> None:
    """Pictures are one float input [channels, height, width] of a task over pictures."""
    if model.task not in PICTURE_TASKS or kind not in (None, "arrays", "images") or not _is_picture(model):
        raise Unsupported(
            f"{name} is for pictures, which are one floating-point input [channels, height, width] of "
            f"{', '.join(PICTURE_TASKS)}; the model is for {model.task} and takes {_shown(model)}.",
            pointer=pointer,
        )
    if name in GEOMETRIC and model.task == "regression":
        raise Unsupported(
            f"{name} moves what a picture shows, and the values of a regression may be places in it: augment the "
            "dataset together with its values.",
            pointer=pointer,
        )


def movable(model: ModelFacts) -> bool:
    """Whether the model takes pictures whose labels stay what they are where a picture moves by a few pixels."""
    return model.task in PICTURE_TASKS and model.task != "regression" and _is_picture(model)


def _is_picture(model: ModelFacts) -> bool:
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 3:
        return False
    channels, _, width = model.inputs[0].shape
    last = width is not None and width <= _MOST_CHANNELS and (channels is None or channels > _MOST_CHANNELS)
    return _is_float(model.inputs[0]) and not last


def _check_sizes(augmentation: Augmentation, model: ModelFacts, pointer: str) -> None:
    """What has to fit a picture: sizes that are open are the worker's to ask for."""
    shape = model.inputs[0].shape
    crop, jitter = augmentation.crop, augmentation.jitter
    if crop is not None and any(size is not None and crop.padding >= size for size in shape[1:]):
        raise InvalidSpec(
            f"padding is to be fewer pixels than a side of the picture, which has {shape[1]} x {shape[2]}; it is "
            f"{crop.padding}.",
            pointer=f"{pointer}/crop/padding",
        )
    if jitter is not None and jitter.saturation and shape[0] != 3:
        raise InvalidSpec(
            f"saturation is for pictures of three channels; the model takes {shape[0]}.",
            pointer=f"{pointer}/jitter/saturation",
        )


def _check_mixing(name: str, model: ModelFacts, pointer: str) -> None:
    """Two samples can be mixed where inputs are amounts and targets are classes."""
    if model.task not in MIXED_TASKS:
        raise Unsupported(
            f"{name} mixes class labels, for {', '.join(MIXED_TASKS)}; the model is for {model.task}.", pointer=pointer
        )
    if not all(_is_float(tensor) or tensor.name == MASK for tensor in model.inputs):
        raise Unsupported(
            f"{name} mixes what samples hold, and the model takes {_shown(model)}: between two ids there is nothing.",
            pointer=pointer,
        )


def _check_spectrograms(options: SpecAugment, model: ModelFacts, kind: DataKind | None, pointer: str) -> None:
    tensor = model.inputs[0]
    if model.task not in SOUND_TASKS or kind not in (None, "arrays", "audio") or not _is_float(tensor):
        raise Unsupported(
            f"spec_augment is for the spectrograms of {', '.join(SOUND_TASKS)}; the model is for {model.task} and "
            f"takes {_shown(model)}" + ("." if kind is None else f", of {kind}."),
            pointer=pointer,
        )
    if len(tensor.shape) not in (2, 3) or 1 in tensor.shape[-2:]:
        raise Unsupported(
            f"spec_augment is for spectrograms, whose last two dimensions are frequency and time; the model takes "
            f"{_shown(model)}. Models of waveforms in transformers mask their own features in training: "
            "`apply_spec_augment`, `mask_time_prob` and `mask_feature_prob` of config.json.",
            pointer=pointer,
        )
    layout = layout_of(options, tensor.shape)
    if layout is None:
        raise InvalidSpec(
            f"Which dimension of {_shown(model)} is frequency is not seen from the sizes: give layout, "
            "frequency_time or time_frequency.",
            pointer=f"{pointer}/layout",
        )
    bands = tensor.shape[-2] if layout == "frequency_time" else tensor.shape[-1]
    if options.frequency_masks and bands is not None and options.frequency_width >= bands:
        raise InvalidSpec(
            f"frequency_width is to be less than the {bands} bands that there are; it is {options.frequency_width}.",
            pointer=f"{pointer}/frequency_width",
        )


def _is_float(tensor: TensorFacts) -> bool:
    return tensor.dtype.startswith("float")


def _shown(model: ModelFacts) -> str:
    return ", ".join(
        f"{one.name} {one.dtype} [{', '.join('*' if size is None else str(size) for size in one.shape)}]"
        for one in model.inputs
    )
