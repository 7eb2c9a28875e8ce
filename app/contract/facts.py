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
OutputKind = Literal["logits", "softmax", "sigmoid", "binary"]
"""What a file gives of a network's logits; `binary` is one probability, that of the second of two classes."""
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

    format: Literal["architecture", "huggingface", "onnx"]
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
    trainable: bool = Field(True, description="Whether steps that train can be used.")
    untrainable_reason: str | None = Field(None, description="Why not, as a sentence.")
    output_kind: OutputKind = Field("logits", description="What the file gives: logits, or probabilities of them.")
    single_samples: bool = Field(False, description="Whether the file's batch is fixed at 1.")


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
