"""What an inspection finds out about an upload: enough for app to refuse a job that cannot work."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal[
    "image-classification",
    "text-classification",
    "audio-classification",
    "token-classification",
    "causal-lm",
    "masked-lm",
    "sentence-embedding",
    "speech-recognition",
    "regression",
    "multi-label",
]
DataKind = Literal["arrays", "images", "text", "audio", "tokens"]
"""What a sample is: named arrays, a picture, a string, a sound, or a sequence of words."""
TargetKind = Literal["classes", "values", "transcripts", "tags"]
"""What a target is: a class number, an array of numbers, a string, or one class number a word."""
Dimension = int | None  # None is a dimension that may vary


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorFacts(Facts):
    """One input of a model or of a sample, without the batch dimension."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: str


class LayerFacts(Facts):
    """One layer with weights: its name as in the state dict (without `.weight`), its type, its weight's shape."""

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    macs: int | None = Field(
        None,
        description="Multiply-accumulates of one sample in the layer; at the first weight of a layer that has several, "
        "0 at its others. Null where only the model's own runtime can run it.",
    )


class Cost(Facts):
    """What one sample costs, measured by the worker that inspected the model: a basis for estimates, not a promise.

    Dimensions that may vary are taken as `length`. Bytes are those above the bare runtime.
    """

    length: int | None = Field(description="Null where the model's inputs have one size.")
    macs: int
    seconds: float = Field(description="Of a forward pass on the CPU, a sample.")
    weight_bytes: int
    activation_bytes: int = Field(description="What training keeps of one sample for the backward pass.")
    inference_bytes: int
    training_bytes: int = Field(description="Weights, gradients, two moments of Adam and a teacher; no sample yet.")


class Applicability(Facts):
    """Whether a technique, or one method of it, can be used on a model."""

    technique: str
    method: str | None = None
    applies: bool
    reason: str | None = Field(None, description="Why it does not.")


class ModelFacts(Facts):
    """An inspected model."""

    format: Literal["architecture", "huggingface"]
    task: Task
    accepts: tuple[DataKind, ...] = Field(description="The kinds of dataset that can feed it.")
    inputs: tuple[TensorFacts, ...]
    classes: int
    labels: tuple[str, ...] | None = None
    parameters: int
    layers: tuple[LayerFacts, ...]
    native_file: str = Field("model.safetensors", description="The name of an artifact in the upload's own format.")
    outputs: tuple[TensorFacts, ...] = ()
    cost: Cost | None = None
    techniques: tuple[Applicability, ...] = ()


class SplitFacts(Facts):
    """One split of an inspected dataset."""

    samples: int
    inputs: tuple[TensorFacts, ...] = Field(description="One entry an array; for other kinds a single entry.")
    targets: TargetKind | None = Field(None, description="What the targets are; null where there are none.")
    target_min: int | None = Field(None, description="Smallest class number of targets that are classes or tags.")
    target_max: int | None = None
    target_shape: tuple[int, ...] | None = Field(None, description="Of one sample's values; null for other targets.")
    binary: bool = Field(False, description="Whether all values are 0 or 1, as those of a multi-label task are.")
    made_from: str | None = Field(None, description="The split that this one was cut from; null where it was uploaded.")

    @property
    def has_targets(self) -> bool:
        return self.targets is not None


class DatasetFacts(Facts):
    """An inspected dataset. `labels` are names where the data carries names (folders, strings), in target order."""

    kind: DataKind
    splits: dict[str, SplitFacts]
    labels: tuple[str, ...] | None = None
    split_seed: int | None = Field(None, description="Of the splits that were made; null where all were uploaded.")


SPLITS = ("train", "validation", "test", "calibration")
# What published datasets call a validation split besides.
_SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev", "eval"), "validation")


def split_named(name: str) -> str | None:
    """The split that a folder, file, array or field of this name means, or None."""
    return _SPLIT_NAMES.get(name)


def made_splits(dataset: DatasetFacts | None) -> str | None:
    """The sentence of a report about splits that were not uploaded; None where none were made."""
    made = {} if dataset is None else {name: s for name, s in dataset.splits.items() if s.made_from is not None}
    if dataset is None or not made:
        return None
    sizes = [f"{name} ({split.samples:,})" for name, split in made.items()]
    source = next(iter(made.values()))
    shares = ", each class in its share" if source.targets == "classes" else ""
    return (
        f"The dataset has only the split {source.made_from}: {', '.join(sizes[:-1])} and {sizes[-1]} were made of it "
        f"at random with seed {dataset.split_seed}{shares}. Upload splits of your own to compare with other figures."
    )


def calibration_split(dataset: DatasetFacts | None) -> str | None:
    """The split that activation ranges are found on: calibration, else train, else validation; never test."""
    names = ("calibration", "train", "validation")
    return next((name for name in names if dataset is not None and name in dataset.splits), None)
