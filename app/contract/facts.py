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


class SplitFacts(Facts):
    """One split of an inspected dataset."""

    samples: int
    inputs: tuple[TensorFacts, ...] = Field(description="One entry an array; for other kinds a single entry.")
    targets: TargetKind | None = Field(None, description="What the targets are; null where there are none.")
    target_min: int | None = None
    target_max: int | None = None

    @property
    def has_targets(self) -> bool:
        return self.targets is not None


class DatasetFacts(Facts):
    """An inspected dataset. `labels` are names where the data carries names (folders, strings), in target order."""

    kind: DataKind
    splits: dict[str, SplitFacts]
    labels: tuple[str, ...] | None = None


SPLITS = ("train", "validation", "test", "calibration")


def calibration_split(dataset: DatasetFacts | None) -> str | None:
    """The split that activation ranges are found on: calibration, else train, else validation; never test."""
    names = ("calibration", "train", "validation")
    return next((name for name in names if dataset is not None and name in dataset.splits), None)
