"""What a child process says over its pipe: JSON, read back as data that is not trusted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.contract.errors import Problem
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.report import Report

# A report of a model with many thousand layers stays far below this.
MAX_MESSAGE_BYTES = 64 << 20


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Started(Message):
    """The child leads a process group of its own and its limits hold."""

    kind: Literal["started"] = "started"


class Progress(Message):
    """How far the work is, 0..1, and the name of the step."""

    kind: Literal["progress"] = "progress"
    progress: Annotated[float, Field(ge=0, le=1)]
    step: Annotated[str, Field(max_length=200)]


class CheckpointWritten(Message):
    """A checkpoint of this kind lies in the folder that the child writes to, and is given away."""

    kind: Literal["checkpoint_written"] = "checkpoint_written"
    of: Literal["step", "training"]
    name: Annotated[str, Field(pattern=r"^checkpoint-[0-9]{1,12}-(step|training)$")]


class Output(Message):
    """A file in the output folder, by its path there."""

    path: Annotated[str, Field(max_length=4096)]
    name: Annotated[str, Field(max_length=128)]
    format: Annotated[str, Field(max_length=40)]
    media_type: Annotated[str, Field(max_length=200)]


class JobDone(Message):
    """A job's result."""

    kind: Literal["job_done"] = "job_done"
    report: Report
    artifacts: Annotated[tuple[Output, ...], Field(max_length=64)]


class SeatDone(Message):
    """This host's part in a job over several is over."""

    kind: Literal["seat_done"] = "seat_done"


class Inspected(Message):
    """An inspection's result."""

    kind: Literal["inspected"] = "inspected"
    facts: ModelFacts | DatasetFacts


class Failed(Message):
    """An error that a client can act on; `fault` holds the traceback where it is one of ours, for the log alone."""

    kind: Literal["failed"] = "failed"
    problem: Problem
    fault: str | None = None


Result = JobDone | SeatDone | Inspected | Failed
Remark = Started | Progress | CheckpointWritten
AnyMessage = Annotated[Remark | JobDone | SeatDone | Inspected | Failed, Field(discriminator="kind")]
_adapter: TypeAdapter[Remark | Result] = TypeAdapter(AnyMessage)


def parse(data: bytes) -> Remark | Result:
    """Raises pydantic.ValidationError for what no child of ours says."""
    return _adapter.validate_json(data)
