"""The report: measured on the uploaded model and on each artifact, all reloaded from their bytes in the same run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.contract.spec import ResolvedSpec


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(Part):
    """The task's metric on a labelled split. A share (accuracy, error rate, F1) is 1 for the whole."""

    name: str
    value: float
    higher_is_better: bool
    split: str
    samples: int


class Latency(Part):
    """Seconds for one batch, after warm-up, measured in turns with its rivals in one process."""

    median_s: float
    p95_s: float
    batch_size: int
    runs: int
    threads: int


class LayerReport(Part):
    """One stored weight."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    sparsity: float = Field(description="Share of exact zeros as stored.")
    bits: float = Field(description="Bits a weight as stored; a mean where they are entropy-coded.")
    sqnr_db: float | None = Field(
        description="Signal to quantization noise of the stored weight against the trained float weight it encodes; "
        "null where nothing was lost, or it was in a step, whose details have it then."
    )


class PackedSizes(Part):
    """What the bytes of a packed artifact are for; together they are its size. Shares of a coded stream are fractions.

    Tensors of fewer than two dimensions (biases, norms) are `biases` with all that is in them.
    """

    positions: float = Field(description="Where the nonzero weights are.")
    values: float = Field(description="Which values they have.")
    codebooks: float = Field(description="Which values there are.")
    biases: float
    header: float = Field(description="Names, shapes, digest.")


class Measurement(Part):
    """What was measured on one file after loading it again."""

    runtime: Literal["torch", "onnxruntime"]
    size_bytes: int
    parameters: int
    nonzero_parameters: int
    macs: int = Field(description="Multiply-accumulates of one sample, batch 1.")
    metric: Metric | None = Field(description="Null where the dataset has no labelled test or validation split.")
    other_metrics: tuple[Metric, ...] = Field(
        (), description="What else is usual for the task, on the same samples; without what the data does not define."
    )
    latency: Latency
    peak_memory_bytes: int = Field(
        description="Peak resident memory of a fresh process above that of the bare runtime."
    )
    layers: tuple[LayerReport, ...]


Details = dict[str, float | int | str | bool | list[dict[str, float | int | str | None]] | None]


class ArtifactReport(Part):
    """One artifact beside the uploaded model."""

    name: str
    format: str
    sha256: str
    measurement: Measurement
    size_ratio: float = Field(description="Uploaded bytes / artifact bytes: above 1 is smaller.")
    metric_change: float | None = Field(description="Artifact minus uploaded, in the metric's own unit.")
    speedup: float = Field(description="Uploaded model in its own runtime / artifact, medians: above 1 is faster.")
    speedup_same_runtime: float = Field(
        description="Uploaded model, converted unchanged to the artifact's runtime / artifact: "
        "the gain without that of the runtime."
    )
    packed_bytes: PackedSizes | None = Field(None, description="How a packed artifact's size splits.")
    details: Details = Field(default_factory=dict, description="How it was made, where data decided that.")


class StepReport(Part):
    """What one step did."""

    technique: str
    seconds: float
    details: Details


class Environment(Part):
    """Where it ran."""

    tersor: str
    python: str
    libraries: dict[str, str]
    cpu: str
    threads: int
    device: str


class Report(Part):
    """The report of a job. `warnings` come first: what got slower, less accurate or no smaller is said there."""

    warnings: tuple[str, ...]
    spec: ResolvedSpec
    seed: int
    uploaded: Measurement
    uploaded_sha256: str
    artifacts: tuple[ArtifactReport, ...]
    steps: tuple[StepReport, ...]
    seconds: dict[str, float] = Field(description="Wall time of load, steps, export, verify, measure.")
    environment: Environment
