"""What a technique is in the worker: the code behind an entry of `app.contract.catalogue`."""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar

from app.contract import report
from app.contract.strict import Strict
from worker.context import Context
from worker.model import Model

SpecT = TypeVar("SpecT", bound=Strict, contravariant=True)
Details = report.Details


class Technique(Protocol[SpecT]):
    """One technique. `name` equals the catalogue's."""

    name: ClassVar[str]

    def applies(self, step: SpecT, model: Model) -> str | None:
        """None where it applies, else the reason why not as a sentence."""

    def apply(self, step: SpecT, context: Context) -> Details:
        """Changes `context.model.module` in place; returns what the report says about the step."""
