"""The tasks that a model without a tokenizer of its own can have, by name."""

from __future__ import annotations

from collections.abc import Callable

from app.contract.errors import ModelRejected
from app.contract.facts import Task as TaskName
from worker.objectives.base import Task
from worker.objectives.classification import Classification
from worker.objectives.embedding import SentenceEmbedding
from worker.objectives.language import CausalLm
from worker.objectives.tokens import TokenClassification
from worker.objectives.values import MultiLabel, Regression

_PLAIN: dict[TaskName, Callable[[], Task]] = {
    "image-classification": Classification,
    "text-classification": Classification,
    "audio-classification": Classification,
    "token-classification": TokenClassification,
    "causal-lm": CausalLm,
    "sentence-embedding": SentenceEmbedding,
    "regression": Regression,
    "multi-label": MultiLabel,
}


def plain_task(name: TaskName) -> Task:
    """The task over arrays. Raises ModelRejected (pointer /task) for one that needs the model's own tokenizer."""
    if name not in _PLAIN:
        raise ModelRejected(
            f"A {name} model needs its tokenizer: upload the whole Hugging Face folder as zip or tar.", pointer="/task"
        )
    return _PLAIN[name]()
