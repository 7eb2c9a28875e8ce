"""What a budget asks of a network: what it limits, what a choice of units costs of that, and what it really costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from app.contract.budgets import TimedBudget
from app.contract.errors import InvalidSpec
from app.contract.structured import StructuredPrune
from worker.constraints import baked
from worker.context import Context
from worker.structure.groups import Group
from worker.techniques.structure.costs import Costs, Counts
from worker.techniques.structure.latencies import Runtime
from worker.techniques.structure.limits import Limit, measured
from worker.techniques.structure.unit_latencies import Latencies
from worker.techniques.structure.units_math import NEAR as ENOUGH

UNITS = "units"
LATENCY = "latency"
MS = 1000.0  # in a second
# Shares of a limit below it, at which a cost is as near as a correction could bring it: a count is exact, a time not.
NEAR = {LATENCY: 0.08}
NEAR_COUNTED = 0.005


@dataclass(frozen=True)
class UnitLimit(Limit):
    """A limit that taking units out is to meet; of a latency, of seconds of a sample in `runtime`."""

    runtime: Runtime | None = None

    def is_met(self, real: float) -> bool:
        """As nearly as it can be."""
        return self.most * (1 - NEAR.get(self.measure, NEAR_COUNTED)) <= real <= self.most

    @property
    def near(self) -> float:
        """The share of it by which less is as good."""
        return NEAR.get(self.measure, ENOUGH)

    def is_near(self, real: float) -> bool:
        """As nearly as is asked for."""
        return self.most * (1 - self.near) <= real <= self.most

    def cost(self, context: Context, groups: Sequence[Group]) -> Callable[[Counts], float]:
        """By arithmetic, for how many units each group keeps of the network as it stands."""
        if self.measure == UNITS:
            return lambda kept: float(sum(kept.values()))
        if self.runtime is None:
            return Costs(self.measure, context.model, groups)
        return Latencies(context, groups, self.runtime.of(baked(context.model.module)))

    def real(self, context: Context, module: nn.Module) -> float:
        """Of a network that could take the place of the context's: counted, or measured, on itself."""
        if self.runtime is not None:
            return self.runtime.of(module)
        return measured(self.measure, context.model, module)


def limit_for(step: StructuredPrune, context: Context, groups: Sequence[Group]) -> UnitLimit:
    """The step's, of the network as it stands. Raises InvalidSpec for milliseconds that the network does not take."""
    if step.budget is None:
        assert step.sparsity is not None
        return UnitLimit(UNITS, 1 - step.sparsity, sum(group.units for group in groups))
    return within_budget(step.budget, context)


def within_budget(budget: TimedBudget, context: Context) -> UnitLimit:
    """What a budget is of the network as it stands. Raises InvalidSpec for milliseconds that it does not take."""
    measure, share = budget.limit
    if not measure.startswith(LATENCY):
        return UnitLimit(measure, share, measured(measure, context.model))
    runtime = Runtime(context)
    if measure == LATENCY:
        return UnitLimit(LATENCY, share, runtime.seconds, runtime)
    if share / MS >= runtime.seconds:
        raise InvalidSpec(
            f"A sample takes {MS * runtime.seconds:.3g} ms in ONNX Runtime on this worker as it is, and the budget is "
            f"{share:g} ms: there is nothing to take out."
        )
    return UnitLimit(LATENCY, share / MS / runtime.seconds, runtime.seconds, runtime)
