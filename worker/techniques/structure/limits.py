"""What a budget is of a network, and what the report says of how much is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from app.contract.budgets import Budget
from worker.evaluation.macs import module_macs
from worker.model import Model
from worker.structure.calls import example_on
from worker.techniques.base import Details

TOLD = ("parameters", "macs")


@dataclass(frozen=True)
class Limit:
    """A share of what a network has of a measure, `whole`."""

    measure: str
    share: float
    whole: float

    @property
    def most(self) -> float:
        return self.share * self.whole


def limit_of(budget: Budget, model: Model) -> Limit:
    """What a budget is of this network, on the device that it is on."""
    measure, share = budget.limit
    return Limit(measure, share, measured(measure, model))


def measured(measure: str, model: Model, module: nn.Module | None = None) -> int:
    """Parameters, MACs of a sample, or bytes of the tensors; of a `module` that may take the place of the model's."""
    module = model.module if module is None else module
    match measure:
        case "parameters":
            return sum(own.numel() for own in module.parameters())
        case "macs":
            return module_macs(module, example_on(module, model, 1))
        case _:
            dtypes = model.dtypes
            named = module.named_parameters()
            return sum(own.numel() * dtypes.get(name, own.dtype).itemsize for name, own in named)


def had(model: Model) -> dict[str, int]:
    """What `remaining` holds a network against."""
    return {name: measured(name, model) for name in TOLD}


def remaining(before: Mapping[str, int], model: Model) -> Details:
    """How much there was, is, and the share of it; and what a native file that needs a spec is uploaded with."""
    details: Details = {}
    for name, own in before.items():
        now = measured(name, model)
        details |= {f"{name}_before": own, name: now, f"{name}_share": now / own}
    if model.spec is not None:
        details["spec"] = json.dumps(model.spec)
    return details
