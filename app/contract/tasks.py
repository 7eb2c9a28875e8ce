"""What is asked of a model: the tasks by name, what each learns from, and the metric that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from app.contract.facts import DatasetFacts, TargetKind, Task


@dataclass(frozen=True)
class TaskKind:
    """A task. `targets` is what a labelled dataset holds; None where the samples are their own targets."""

    targets: TargetKind | None
    metric: str
    higher_is_better: bool
    output: str = "logits"
    needs_teacher: bool = False
    """Whether there is no loss of the task's own, so that training needs `distill`."""

    @property
    def names_classes(self) -> bool:
        """Whether a target is one of the model's classes, so that a dataset's labels have to be the model's."""
        return self.targets in ("classes", "tags") and not self.needs_teacher

    def labelled(self, targets: TargetKind | None) -> bool:
        """Whether a split with such targets can be learnt from and judged."""
        return self.targets is None or self.targets == targets


_CLASSES = TaskKind("classes", "accuracy", higher_is_better=True)
_LANGUAGE = TaskKind(None, "perplexity", higher_is_better=False)

TASKS: dict[Task, TaskKind] = {
    "image-classification": _CLASSES,
    "text-classification": _CLASSES,
    "audio-classification": _CLASSES,
    "token-classification": TaskKind("tags", "accuracy", higher_is_better=True),
    "causal-lm": _LANGUAGE,
    "masked-lm": _LANGUAGE,
    "sentence-embedding": TaskKind(
        "classes", "nearest_neighbour_accuracy", higher_is_better=True, output="embedding", needs_teacher=True
    ),
    "speech-recognition": TaskKind("transcripts", "word_error_rate", higher_is_better=False),
    "regression": TaskKind("values", "mean_squared_error", higher_is_better=False, output="values"),
    "multi-label": TaskKind("values", "f1", higher_is_better=True),
}

HIGHER_IS_BETTER = {kind.metric: kind.higher_is_better for kind in TASKS.values()} | {
    "balanced_accuracy": True,
    "macro_f1": True,
    "top_5_accuracy": True,
    "token_accuracy": True,
    "mean_average_precision": True,
    "exact_match": True,
    "r2": True,
    "log_loss": False,
    "calibration_error": False,
    "character_error_rate": False,
    "root_mean_squared_error": False,
    "mean_absolute_error": False,
}
"""Every metric of a report by its name."""


def evaluation_split(dataset: DatasetFacts | None, task: Task) -> str | None:
    """The split that metrics are measured on: test, else validation, where it is labelled; else none."""
    if dataset is None:
        return None
    labelled = TASKS[task].labelled
    names = (name for name in ("test", "validation") if name in dataset.splits)
    return next((name for name in names if labelled(dataset.splits[name].targets)), None)
