"""Which splits of a dataset the steps of a job need, and with what in them."""

from __future__ import annotations

from app.contract.compression import Compress
from app.contract.errors import DatasetMismatch, Unsupported
from app.contract.factorizing import Factorize
from app.contract.facts import DatasetFacts, SplitFacts, Task, calibration_split
from app.contract.mixed import Mixed
from app.contract.pruning import OF_GRADIENTS, OF_INPUTS, Prune
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.spec import Quantize, ResolvedSpec, trainings_of
from app.contract.structured import BY_GRADIENTS, StructuredPrune
from app.contract.tasks import TASKS
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from app.contract.widths import ResizeWidth, TakesUnits


def check_splits(spec: ResolvedSpec, dataset: DatasetFacts | None, task: Task | None = None) -> None:
    """Raises DatasetMismatch unless the dataset has the splits that the steps need.

    Without a task, whose model is still being inspected, labels are not asked for.
    """
    for index, step in enumerate(spec.steps):
        pointer = spec.pointer(index)
        for where, training in trainings_of(step).items():
            _check_training(training, dataset, task, pointer if where == "training" else f"{pointer}/{where}")
        if isinstance(step, Compress):
            _check_judged("compress", dataset, task, pointer)
        if isinstance(step, Factorize):
            _check_factorizing_data(step, dataset, task, pointer)
        if isinstance(step, Resize | Rewire):
            _check_resizing_data(step, dataset, task, pointer)
        if isinstance(step, StructuredPrune):
            _check_structured_data(step, dataset, task, pointer)
        if isinstance(step, ResizeWidth):
            _check_width_data(step, dataset, task, pointer)
        if isinstance(step, TakesUnits) and step.reconstruct is True:
            _check_looked_at("reconstruct", dataset, pointer)
        if isinstance(step, Prune):
            _check_pruning_data(step, dataset, task, pointer)
        if isinstance(step, Quantize | Mixed) and step.max_accuracy_drop is not None:
            _check_judged("max_accuracy_drop", dataset, task, f"{pointer}/max_accuracy_drop")
        if isinstance(step, Mixed) and calibration_split(dataset) is None:
            raise DatasetMismatch(
                "Method mixed needs a `calibration`, `train` or `validation` split to measure what rounding a layer "
                "does to the outputs; " + _has(dataset),
                pointer=pointer if dataset is not None else "/dataset",
            )
        if isinstance(step, WeightOnly) and step.looks_at_inputs and calibration_split(dataset) is None:
            raise DatasetMismatch(
                f"{step.algorithm} needs a `calibration`, `train` or `validation` split to see what comes into the "
                f"layers, and algorithms rtn and hqq need none; {_has(dataset)}",
                pointer=pointer if dataset is not None else "/dataset",
            )
        if isinstance(step, Quantize) and step.method == "static" and calibration_split(dataset) is None:
            raise DatasetMismatch(
                "Static quantization needs a `calibration`, `train` or `validation` split to find activation ranges; "
                + _has(dataset),
                pointer=pointer if dataset is not None else "/dataset",
            )


def _check_pruning_data(step: Prune, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    """Criteria that look at gradients need labels, those that look at inputs and scope auto any samples."""
    if step.criterion in OF_GRADIENTS:
        _check_taught(step.criterion, dataset, task, pointer)
    if step.criterion in OF_INPUTS or step.within == "auto":
        what = f"Criterion {step.criterion}" if step.criterion in OF_INPUTS else "Scope auto"
        _check_looked_at(what, dataset, pointer)


def _check_structured_data(
    step: StructuredPrune, dataset: DatasetFacts | None, task: Task | None, pointer: str
) -> None:
    if step.criterion in BY_GRADIENTS:
        _check_taught(step.criterion, dataset, task, pointer)
    if step.looks_at_samples:
        what = "Scope auto" if step.scope == "auto" else f"Criterion {step.criterion}"
        _check_looked_at(what, dataset, pointer)


def _check_width_data(step: ResizeWidth, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    if step.criterion in BY_GRADIENTS:
        _check_taught(step.criterion, dataset, task, pointer)
    if step.looks_at_samples:
        searched = step.search == "evolutionary"
        _check_looked_at("Search evolutionary" if searched else f"Criterion {step.criterion}", dataset, pointer)


def _check_factorizing_data(step: Factorize, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    if step.criterion == "fisher":
        _check_taught(step.criterion, dataset, task, pointer)
    if step.looks_at_samples:
        measured = step.allocation == "measured"
        _check_looked_at("Allocation measured" if measured else f"Criterion {step.criterion}", dataset, pointer)


def _check_resizing_data(step: Resize | Rewire, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    if step.looks_at_samples:
        _check_looked_at(f"Criterion {step.criterion}", dataset, pointer)
    else:
        _check_taught(step.criterion, dataset, task, pointer)


def _check_taught(criterion: str, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    """What looks at gradients needs labels."""
    train = dataset.splits.get("train") if dataset is not None else None
    if train is None or not _labelled(train, task):
        raise DatasetMismatch(
            f"Criterion {criterion} needs a `train` split with {_targets(task)}; " + _has(dataset),
            pointer=pointer if dataset is not None else "/dataset",
        )


def _check_looked_at(what: str, dataset: DatasetFacts | None, pointer: str) -> None:
    """What looks at inputs or outputs needs samples."""
    if calibration_split(dataset) is None:
        raise DatasetMismatch(
            f"{what} needs a `calibration`, `train` or `validation` split; " + _has(dataset),
            pointer=pointer if dataset is not None else "/dataset",
        )


def _check_training(training: Training, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    """Labels are needed where no teacher stands in for them."""
    if task is not None and TASKS[task].needs_teacher and training.distill is None:
        raise Unsupported(f"A {task} model is trained by distillation: give `distill` in `training`.", pointer=pointer)
    train = dataset.splits.get("train") if dataset is not None else None
    if train is None or not (training.distill is not None or _labelled(train, task)):
        raise DatasetMismatch(
            f"Training needs a `train` split with {_targets(task)}, or `distill` and no targets; " + _has(dataset),
            pointer=pointer if dataset is not None else "/dataset",
        )
    if training.judges:
        what = "Early stopping" if training.early_stopping is not None else "Schedule plateau"
        _check_judged(what, dataset, task, pointer)


def _check_judged(what: str, dataset: DatasetFacts | None, task: Task | None, pointer: str) -> None:
    validation = dataset.splits.get("validation") if dataset is not None else None
    if validation is None or not _labelled(validation, task):
        raise DatasetMismatch(
            f"{what} needs a `validation` split with {_targets(task)}; " + _has(dataset), pointer=pointer
        )


def _labelled(split: SplitFacts, task: Task | None) -> bool:
    return task is None or TASKS[task].labelled(split.targets)


def _targets(task: Task | None) -> str:
    return "samples" if task is None else TASKS[task].targets or "samples"


def _has(dataset: DatasetFacts | None) -> str:
    if dataset is None:
        return "the job names no dataset."
    parts = [f"{name} ({split.samples}, {split.targets or 'no targets'})" for name, split in dataset.splits.items()]
    return f"the dataset has {', '.join(parts)}."
