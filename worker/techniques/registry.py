"""Every technique by its name: an explicit table, so that nothing is found by accident and nothing twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from worker.techniques.base import Technique
from worker.techniques.compression.compress import CompressTechnique
from worker.techniques.distillation.distill import DistillTechnique
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.structure.factorize import FactorizeTechnique
from worker.techniques.structure.fuse import FuseTechnique
from worker.techniques.structure.resize import ResizeTechnique
from worker.techniques.training.finetune import FinetuneTechnique


def table(techniques: Iterable[Technique[Any]]) -> dict[str, Technique[Any]]:
    """The techniques by name; two of one name are a programming error (RuntimeError)."""
    found: dict[str, Technique[Any]] = {}
    for technique in techniques:
        if technique.name in found:
            raise RuntimeError(f"two techniques share the name {technique.name}")
        found[technique.name] = technique
    return found


TECHNIQUES: dict[str, Technique[Any]] = table(
    (
        PruneTechnique(),
        FinetuneTechnique(),
        DistillTechnique(),
        QuantizeTechnique(),
        CompressTechnique(),
        FactorizeTechnique(),
        ResizeTechnique(),
        FuseTechnique(),
    )
)
