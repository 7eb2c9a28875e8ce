"""The one object that says how to train, wherever a technique trains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from app.contract.augmentation import Augmentation
from app.contract.distillation import Distill
from app.contract.optimizing import Auto, Optimizer, Optimizing, Rate
from app.contract.scheduling import Scheduling
from app.contract.strict import Strict

BatchSize = Annotated[int, Field(ge=1, le=65_536)]


class EarlyStopping(Strict):
    """Ends the training when the validation metric has not grown for `patience` epochs, and keeps the best weights."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    min_delta: Annotated[float, Field(ge=0, le=1)] = 0.0


class Search(Strict):
    """How settings that are "auto" are found: by short trainings of copies of the model, before the training."""

    budget: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            description="Samples that the race may train on, in trainings as long as this one; 0: no race.",
        ),
    ] = 1.5


class Training(Optimizing, Scheduling):
    """How to train. Give `epochs` or `steps`; without either, one epoch.

    `optimizer`, `lr` and `batch_size` may be "auto".
    """

    epochs: Annotated[int | None, Field(ge=1, le=10_000)] = None
    steps: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    batch_size: BatchSize | Auto = Field(64, description="Samples of one step; auto: found.")
    micro_batch_size: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Samples in memory at once: a step adds up the gradients of such parts."),
    ] = None
    processes: Annotated[
        int, Field(ge=1, le=64, description="Processes that train together, each on its share of every batch.")
    ] = 1
    hosts: Annotated[
        int, Field(ge=1, le=16, description="Workers that train together, each with as many `processes`.")
    ] = 1
    sharded: bool = Field(
        False, description="Whether weights, gradients and optimizer state are shared out among the processes."
    )
    early_stopping: EarlyStopping | None = None
    checkpoint_steps: Annotated[
        int, Field(ge=1, le=1_000_000, description="Steps between the points that a training can go on from.")
    ] = 200
    distill: Distill | None = None
    augmentation: Augmentation | None = None
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="Share of a target that is spread evenly over all classes (Szegedy 2015).")
    ] = 0.0
    search: Search = Field(default_factory=Search)

    @property
    def automatic(self) -> tuple[str, ...]:
        """The settings that have to be found."""
        return tuple(name for name in ("optimizer", "lr", "batch_size") if getattr(self, name) == "auto")

    def settled(self, **found: Any) -> Settled:
        """The same with what was found for `optimizer`, `lr` and `batch_size`. None of them may be left to find."""
        fields = self.model_dump() | found
        if fields["micro_batch_size"] is not None and fields["micro_batch_size"] > fields["batch_size"]:
            fields["micro_batch_size"] = None  # what was found fits at once
        return Settled.model_validate(fields)

    @property
    def ranks(self) -> int:
        """Processes on all hosts."""
        return self.hosts * self.processes

    @property
    def judges(self) -> bool:
        """Whether every epoch is judged on the validation split."""
        return self.early_stopping is not None or self.schedule == "plateau"

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with others, and so have several labels."""
        return self.augmentation is not None and bool({"mixup", "cutmix"} & {*self.augmentation.named})

    @model_validator(mode="after")
    def _labels_are_read(self) -> Training:
        """Refuses what would be done to labels that nothing learns from, or that have no one right class any more."""
        if self.distill is None:
            return self
        if self.label_smoothing and self.distill.alpha == 1:
            raise ValueError("label_smoothing is for the task's own loss, which distill with alpha 1 leaves out")
        if self.mixes and any(loss.kind == "decoupled" for loss in self.distill.losses):
            raise ValueError("decoupled tells one right class from the others, and a mixed sample has two: give one")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be fewer than the {self.steps} steps; they are {self.warmup_steps}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        known = self.batch_size if self.batch_size != "auto" else None
        if known is not None and self.micro_batch_size is not None and self.micro_batch_size > known:
            raise ValueError(f"micro_batch_size is a part of batch_size, which is {self.batch_size}")
        if self.sharded and self.ranks == 1:
            raise ValueError("sharded shares weights out among processes: give processes, 2 or more")
        if self.sharded and self.optimizer == "adafactor":
            raise ValueError(
                "adafactor keeps sums of rows and columns, which sharded would cut: give another optimizer"
            )
        if known is not None and known < self.ranks:
            raise ValueError(f"{self.ranks} processes need a batch_size of {self.ranks} or more; it is {known}")
        if self.early_stopping is not None and self.averaging is not None and self.averaging.kind == "swa":
            raise ValueError("averaging swa needs the end of the training, which early_stopping cuts off: give one")
        return self


class Settled(Training):
    """A training whose every setting is known: what the loop takes."""

    optimizer: Optimizer = "adam"
    lr: Rate = 1e-3
    batch_size: BatchSize = 64
