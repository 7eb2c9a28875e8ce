"""Whether two models take the same samples as the same numbers: teacher and student see one batch."""

from __future__ import annotations

import torch

from app.contract.errors import ModelsMismatch
from worker.data.base import Data
from worker.model import Model

SAMPLES = 4  # enough for padding, and for words that tokenizers cut apart differently


def check_encodings(model: Model, other: Model, id: str, pointer: str, data: Data | None) -> None:
    """Raises ModelsMismatch unless `other` encodes the first samples as `model` does, bit for bit."""
    if data is None:
        return
    split = data.splits["train"] if "train" in data.splits else next(iter(data.splits.values()))
    raw = split.read(range(min(SAMPLES, len(split))))
    ours, theirs = model.encode(raw), other.encode(raw)
    if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
        raise ModelsMismatch(
            f"{id} makes other inputs of the same samples than the job's model does: both need the same tokenizer or "
            "preprocessor.",
            pointer=pointer,
        )
