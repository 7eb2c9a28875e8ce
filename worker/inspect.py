"""What an uploaded file is: asked once, in a process of its own, before any job may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.contract.catalogue import TECHNIQUES as CATALOGUE
from app.contract.errors import ModelRejected, TersorError
from app.contract.facts import Applicability, DatasetFacts, ModelFacts, TensorFacts
from app.contract.spec import STRUCTURED
from app.contract.structured import StructuredPrune
from app.contract.tasks import TASKS
from worker.data import open_data
from worker.evaluation.cost import measure_cost
from worker.loading import load_model
from worker.model import Model
from worker.techniques.registry import TECHNIQUES
from worker.vetting.boundary import refusing


def inspect_upload(
    kind: str, path: Path, filename: str, spec: dict[str, Any], scratch: Path
) -> ModelFacts | DatasetFacts:
    """The facts of a "model" or a "dataset". Raises ModelRejected or DatasetRejected; writes under `scratch` alone."""
    if kind == "model":
        with refusing(ModelRejected, filename, "a model"):
            return examine(load_model(path, filename, spec, scratch))
    return open_data(path, filename, spec, scratch).facts


def examine(model: Model) -> ModelFacts:
    """A loaded model's facts, with what only running it tells."""
    cost, layers = measure_cost(model)
    return model.facts.model_copy(
        update={
            "layers": layers,
            "outputs": (_output(model),),
            "cost": cost,
            "techniques": tuple(
                applicability(technique.name, step, model) for technique in CATALOGUE for step in technique.methods
            ),
        }
    )


def applicability(name: str, step: Any, model: Model) -> Applicability:
    """Whether a step can be applied to a model, and if not, why."""
    try:
        reason = TECHNIQUES[name].applies(step, model)
    except TersorError as error:
        reason = error.detail
    return Applicability(technique=name, method=_method(step), applies=reason is None, reason=reason)


def _method(step: Any) -> str | None:
    """What tells the steps of a technique apart."""
    return STRUCTURED if isinstance(step, StructuredPrune) else getattr(step, "method", None)


def _output(model: Model) -> TensorFacts:
    """The output's shape: a dimension that changes with the length of the inputs may vary."""
    with torch.inference_mode():
        found = model.module(*model.example(1))
    other = _other_shape(model) or found.shape
    shape = tuple(a if a == b else None for a, b in zip(found.shape[1:], other[1:], strict=True))
    return TensorFacts(name=TASKS[model.facts.task].output, shape=shape, dtype=str(found.dtype).removeprefix("torch."))


def _other_shape(model: Model) -> torch.Size | None:
    """The output's shape for inputs of half the length, or of double; None for a model of one length alone."""
    if all(size is not None for tensor in model.facts.inputs for size in tensor.shape):
        return None
    for length in (max(1, model.example_length // 2), 2 * model.example_length):
        try:
            with torch.inference_mode():
                shape: torch.Size = model.module(*model.example(1, length=length)).shape
        except Exception:  # noqa: S112 - networks fail on sizes that leave nothing of the input, in errors of any class
            continue
        return shape
    return None
