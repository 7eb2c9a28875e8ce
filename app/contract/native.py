"""Whether the upload's own format can say what a job makes of a network, and which artifact stands in if it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from app.contract.errors import Unsupported
from app.contract.factorizing import Factorize
from app.contract.facts import ModelFacts
from app.contract.fusing import Fuse
from app.contract.rewiring import Rewire
from app.contract.spec import ExportFormat, ResolvedSpec, Step
from app.contract.structured import StructuredPrune

STAND_IN: ExportFormat = "pt2"
FOR_A_CONFIG = ("packed", "compressed-tensors")  # hold weights that a config gives the layers of


def written(asked: Sequence[ExportFormat], stand_in: ExportFormat | None) -> tuple[ExportFormat, ...]:
    """The formats that are written, each once, where another stands in for the upload's own."""
    return tuple(dict.fromkeys((stand_in or name) if name == "native" else name for name in asked))


def planned(spec: ResolvedSpec, model: ModelFacts) -> tuple[ExportFormat, ...]:
    """The formats that a job will most likely write."""
    return written(spec.export, STAND_IN if _lacks_words(spec, model) else None)


def check_words(spec: ResolvedSpec, model: ModelFacts) -> None:
    """Raises Unsupported for an artifact that could not hold what the steps make."""
    held = [name for name in FOR_A_CONFIG if name in spec.export]
    if held and _lacks_words(spec, model):
        raise Unsupported(
            f"A config of transformers has no words for layers of sizes or connections of their own, and {held[0]} "
            "holds weights for one: export pt2 or onnx.",
            pointer="/export",
        )


def _lacks_words(spec: ResolvedSpec, model: ModelFacts) -> bool:
    """A config of transformers gives all layers one width and the same connections, and has no products; fewer layers
    it can say, and others say anything. Whether layers that lose the same share come to one width is only known when
    they have."""
    return model.format == "huggingface" and any(_beyond_words(step, model) for step in spec.steps)


def _beyond_words(step: Step, model: ModelFacts) -> bool:
    """Whether there are weights that no output needs is only known when the network has run."""
    if isinstance(step, Fuse):
        return "batch_norm" in step.passes and any(layer.type.startswith("BatchNorm") for layer in model.layers)
    return isinstance(step, Factorize | Rewire) or (isinstance(step, StructuredPrune) and step.scope != "local")
