"""The compress step: as few bytes as hold a metric."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.distillation import Distill
from app.contract.pruning import Pattern
from app.contract.strict import Strict
from app.contract.training import Search, Training

# Steps, not epochs: small data needs as many as large. Labels weigh more than the teacher: moved pictures teach what it
# does not know.
ROUND = Training(
    steps=3000,
    search=Search(budget=0.5),
    batch_size=128,
    optimizer="adam",
    lr="auto",
    schedule="cosine",
    distill=Distill(temperature=2.0, alpha=0.3),
)


class Compress(Strict):
    """Lowers the bytes of the packed artifact, round by round, until the metric on the validation split would fall
    below the uploaded model's, and stops at the last that held.

    A round prunes a share of what is left, gradually, and trains; then, on a copy, it shares values, trains these, and
    packs. What has no effect on any output goes too, and units of which nothing is left leave the network.
    """

    technique: Literal["compress"] = "compress"
    max_accuracy_drop: Annotated[
        float,
        Field(ge=0, le=1, description="By how much the task's metric on validation may be worse than the upload's."),
    ] = 0.0
    margin: Annotated[
        float,
        Field(
            ge=0,
            le=3,
            description="Standard errors of the metric by which a round is better held: the best of many rounds is "
            "flattered. One that holds by less is chosen where it has less than two thirds of the bytes.",
        ),
    ] = 1.0
    keep: Annotated[float, Field(gt=0, lt=1, description="Share of the weights that the first round keeps.")] = 0.3
    factor: Annotated[
        float, Field(ge=0.3, le=0.95, description="Share of those that each next round keeps, on the way down.")
    ] = 0.5
    longer: Annotated[
        int,
        Field(
            ge=1, le=20, description="How many times as long the rounds of smaller steps, behind the way down, train."
        ),
    ] = 2
    rounds: Annotated[int, Field(ge=1, le=100, description="At most.")] = 24
    patience: Annotated[
        int,
        Field(
            ge=1,
            le=10,
            description="Rounds in a row that may fail: on the way down, and again in smaller steps behind it.",
        ),
    ] = 3
    entries: Annotated[int, Field(ge=2, le=256, description="Values of a codebook.")] = 8
    most_entries: Annotated[
        int,
        Field(
            ge=2,
            le=256,
            description="Where a round holds before its values are shared and not behind, it is tried again with twice "
            "as many, up to this.",
        ),
    ] = 32
    shift: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Pixels by which pictures are moved at random in every training that says nothing of "
            "augmentation; 0 for none. Models that take no pictures are trained on what there is.",
        ),
    ] = 1
    narrow: bool = Field(
        True,
        description="Whether units that nothing reads any more leave the network, where the upload's format can say "
        "so: the rounds that follow are faster, and what is delivered has fewer of them.",
    )
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
    training: Training = Field(
        ROUND, description="Of every round on the way down; that of the values takes half as long."
    )

    @model_validator(mode="after")
    def _alone(self) -> Compress:
        if self.training.ranks > 1:
            raise ValueError("compress trains in one process: leave hosts and processes out")
        return self
