"""How much of a model may be left, where a step makes its network smaller."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from app.contract.strict import Strict

Share = Annotated[float, Field(gt=0, lt=1)]


class Budget(Strict):
    """One limit, as a share of what the model has as it stands when the step begins."""

    parameters: Annotated[Share | None, Field(description="Of all parameters.")] = None
    macs: Annotated[Share | None, Field(description="Of the multiply-accumulates of a sample.")] = None
    bytes: Annotated[Share | None, Field(description="Of the bytes of its tensors, as artifacts store them.")] = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name, share in self if share is not None]
        if len(given) != 1:
            *names, last = type(self).model_fields
            raise ValueError(f"give one of {', '.join(names)} and {last}, not {' and '.join(given) or 'none'}")
        return self

    @property
    def limit(self) -> tuple[str, float]:
        """What is limited, and to which share."""
        return next((name, share) for name, share in self if share is not None)


class TimedBudget(Budget):
    """One limit, which may be one of time: as it is measured in ONNX Runtime on the worker, for one sample."""

    latency: Annotated[Share | None, Field(description="Of the time of a sample.")] = None
    latency_ms: Annotated[float | None, Field(gt=0, le=1e6, description="Milliseconds of a sample.")] = None
