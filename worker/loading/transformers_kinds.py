"""The kinds of transformers' models: which task each class is for, how it is fed, and which of its outputs is meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.auto import modeling_auto as auto

from app.contract.errors import ModelRejected
from app.contract.facts import Task
from worker.loading.feeding import audio, images, text
from worker.loading.feeding.base import Feeding
from worker.loading.folder import MODULES, POOLING, Folder
from worker.objectives.classification import Classification
from worker.objectives.embedding import SentenceEmbedding
from worker.objectives.values import MultiLabel, Regression

Feeder: TypeAlias = Callable[[Folder, Any], Feeding]
Answer: TypeAlias = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""Takes what a module of transformers returned and the inputs by name; gives the one tensor that is meant."""
Names: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A task as transformers serves it: class names by `model_type`, and how its classes are fed."""

    task: Task
    names: Names
    feed: Feeder
    labelled: bool = False
    """Whether `id2label` of the config names the outputs."""

    def has(self, name: str, model_type: str) -> bool:
        known = self.names.get(model_type)
        return name in (known if isinstance(known, tuple | list) else (known,))


def _classes(feeding: Callable[..., Feeding]) -> Feeder:
    """One answer a sample, which `problem_type` may turn into several labels or into numbers."""

    def feed(folder: Folder, module: Any) -> Feeding:
        tasks = {"multi-label": MultiLabel, "regression": Regression}
        return feeding(folder, module, tasks.get(problem(module.config) or "", Classification)())

    return feed


def _embedding_feeding(folder: Folder, module: Any) -> Feeding:
    return text.text_feeding(folder, module, SentenceEmbedding())


# Where a class serves two tasks, the first one is meant unless the spec says otherwise.
KINDS: tuple[Kind, ...] = (
    Kind(
        "image-classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, _classes(images.image_feeding), True
    ),
    Kind(
        "text-classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, _classes(text.text_feeding), True
    ),
    Kind(
        "audio-classification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, _classes(audio.audio_feeding), True
    ),
    Kind("token-classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, text.token_feeding, True),
    Kind("masked-lm", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, text.masked_feeding),
    Kind("causal-lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, text.causal_feeding),
    Kind("speech-recognition", auto.MODEL_FOR_CTC_MAPPING_NAMES, audio.ctc_feeding),
    Kind("speech-recognition", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, audio.transcription_feeding),
    Kind("sentence-embedding", auto.MODEL_MAPPING_NAMES, _embedding_feeding),
)


def problem(config: Any) -> Task | None:
    """The task that `problem_type` makes of a classifier, None where it stays one.

    Raises ModelRejected for an unknown one, and for one class, which is nothing to choose from.
    """
    if config.problem_type == "multi_label_classification":
        return "multi-label"
    if config.problem_type == "regression":
        return "regression"
    if config.problem_type not in (None, "single_label_classification"):
        raise ModelRejected(f"config.json has the problem_type {str(config.problem_type)[:80]!r}, which is unknown.")
    if config.num_labels < 2:
        raise ModelRejected(
            f"The model has {config.num_labels} label; a classifier has at least two. For one that predicts numbers "
            'set "problem_type": "regression" in config.json.'
        )
    return None


def answer_of(kind: Kind, folder: Folder) -> Answer:
    """Which tensor of the module's return is the model's output."""
    if kind.task != "sentence-embedding":
        return lambda returned, inputs: returned.logits
    pool, normalize = _pooling(folder), _normalizes(folder)

    def embedding(returned: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        vectors = pool(returned.last_hidden_state, inputs["attention_mask"])
        return functional.normalize(vectors, dim=-1) if normalize else vectors

    return embedding


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of [batch, tokens, dimensions] over the tokens that are no padding (Reimers & Gurevych 2019)."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask[..., None] == 0, torch.finfo(states.dtype).min).amax(1)


_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_cls_token": _first,
    "pooling_mode_max_tokens": _largest,
}


def _pooling(folder: Folder) -> Callable[[Tensor, Tensor], Tensor]:
    """As sentence-transformers' `1_Pooling` says; the mean where the folder has none."""
    if not folder.has(POOLING):
        return _mean
    config = _object(folder, POOLING)
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelRejected(f"{POOLING!r} asks for {', '.join(modes) or 'no pooling'}; one of {', '.join(_POOLINGS)}.")
    return _POOLINGS[modes[0]]


def _normalizes(folder: Folder) -> bool:
    """Whether modules.json ends in Normalize. Raises ModelRejected for modules that are not known here."""
    if not folder.has(MODULES):
        return False
    modules = _value(folder, MODULES)
    entries = modules if isinstance(modules, list) else []
    types = [str(entry.get("type")).rpartition(".")[2] for entry in entries if isinstance(entry, dict)]
    if unknown := [name for name in types if name not in ("Transformer", "Pooling", "Normalize")]:
        raise ModelRejected(f"{MODULES!r} names {unknown[0][:80]!r}; Transformer, Pooling and Normalize are taken.")
    return "Normalize" in types


def is_sentence_transformer(folder: Folder) -> bool:
    """Whether the folder was written by sentence-transformers."""
    return folder.has(MODULES)


def _object(folder: Folder, name: str) -> dict[str, Any]:
    value = _value(folder, name)
    if not isinstance(value, dict):
        raise ModelRejected(f"{name!r} in the folder is no JSON object.")
    return value


def _value(folder: Folder, name: str) -> Any:
    try:
        return json.loads(folder.originals[name])
    except (ValueError, RecursionError) as failure:
        raise ModelRejected(f"{name!r} in the folder is no JSON.") from failure
