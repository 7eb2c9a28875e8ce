"""What can be done: each technique with its spec, its needs and its place in the order. Drives `GET /v1/techniques`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.contract.automatic import Automatic
from app.contract.cast import Cast
from app.contract.codebook import Codebook
from app.contract.compression import Compress
from app.contract.errors import OrderRefused
from app.contract.factorizing import Factorize
from app.contract.fusing import Fuse
from app.contract.mixed import Mixed
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.spec import RESTRUCTURING, DistillStep, Finetune, Quantize, ResolvedSpec, Step, trainings_of
from app.contract.strict import Strict
from app.contract.structured import StructuredPrune
from app.contract.weight_only import FewBits, WeightOnly
from app.contract.widths import ResizeWidth

# In which artifact int8 is delivered: it lives in the file, and not in the module.
INT8_EXPORTS = {"static": ("onnx", "pt2"), "qat": ("onnx", "pt2"), "dynamic": ("onnx",)}
INT8_EXPORT = "onnx"  # of all of these methods

Family = Literal["pruning", "training", "distillation", "quantization", "structure"]


@dataclass(frozen=True)
class Technique:
    """The declarative header of a technique; the worker's class of the same name does the work."""

    name: str
    family: Family
    title: str
    needs: str
    applies_to: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    may_not_follow: frozenset[str] = field(default_factory=frozenset)
    exports: tuple[str, ...] = ("native", "onnx", "packed", "pt2")
    methods: tuple[Strict, ...] = ()
    """A step for each way of using it, with which a model is asked whether it applies."""

    @property
    def specs(self) -> tuple[type[Strict], ...]:
        """The kinds of its steps."""
        return tuple(dict.fromkeys(map(type, self.methods)))

    @property
    def requires_export(self) -> str | None:
        """The artifact in which int8 (of quantize: methods static and dynamic) is delivered; static in pt2 as well."""
        return INT8_EXPORT if any(isinstance(step, Quantize) for step in self.methods) else None


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        name="prune",
        family="pruning",
        title="Prune weights, or whole units",
        needs="A labelled `train` split where `training` is given, or by gradients; samples of any split by inputs; no "
        "data otherwise.",
        applies_to="Weights of Linear, Conv1d/2d/3d, ConvTranspose, Embedding, LSTM, GRU and attention layers. "
        "structured: channels, neurons, heads and hidden features, in a model that can be trained; a Hugging Face "
        "folder is delivered as pt2 and onnx.",
        may_not_follow=frozenset({"quantize"}),
        methods=(Prune(sparsity=0.5), StructuredPrune(sparsity=0.3)),
    ),
    Technique(
        name="finetune",
        family="training",
        title="Train, with or without distillation",
        needs="A labelled `train` split; `validation` for early stopping.",
        applies_to="Every model.",
        may_not_follow=frozenset({"quantize"}),
        methods=(Finetune(),),
    ),
    Technique(
        name="distill",
        family="distillation",
        title="Distil into a student",
        needs="A `train` split, labels not needed; `validation` for early stopping.",
        applies_to="auto and architecture: models that came as an architecture or with a config of transformers. "
        "model, or no student: every model.",
        may_not_follow=frozenset({"quantize"}),
        methods=(DistillStep(),),
    ),
    Technique(
        name="compress",
        family="pruning",
        title="Compress to the fewest bytes that hold the metric",
        needs="A `train` split, and a labelled `validation` split.",
        applies_to="What prune and training are for.",
        may_not_follow=frozenset({"quantize"}),
        methods=(Compress(),),
    ),
    Technique(
        name="factorize",
        family="structure",
        title="Factorize layers into products of thinner ones",
        needs="A `train` split where `training` is given, labelled for criterion fisher; samples of any split for "
        "criterion activations and allocation measured; no data otherwise.",
        applies_to="Linear, Conv1d/2d/3d without groups, in a model that can be trained. A Hugging Face folder is "
        "delivered as pt2 and onnx.",
        may_not_follow=frozenset({"quantize"}),
        exports=("native", "onnx", "packed", "pt2"),
        methods=(Factorize(energy=0.9),),
    ),
    Technique(
        name="resize",
        family="structure",
        title="Leave out the layers or connections that do the least, or make all layers narrower",
        needs="A `train` split where `training` is given. drop_layers and connections: samples of any split; a "
        "labelled `train` split for criterion taylor. width: what structured prune needs, and samples of any split for "
        "search evolutionary.",
        applies_to="drop_layers: models that came as an architecture or with a config of transformers, with blocks "
        "that give the shape that they take: layers of a transformer, residual blocks. width: what structured prune is "
        "for. connections: models that can be trained, with ways that part and meet again; a Hugging Face folder is "
        "delivered as pt2 and onnx.",
        may_not_follow=frozenset({"quantize"}),
        exports=("native", "onnx", "packed", "compressed-tensors", "pt2"),
        methods=(Resize(layers=1), Rewire(connections=1), ResizeWidth(multiplier=0.5)),
    ),
    Technique(
        name="fuse",
        family="structure",
        title="Leave out what the network computes for nothing",
        needs="No data.",
        applies_to="Models that can be trained. Batch norms in all of them, dead weights in folders of transformers "
        "and graphs, all else in programs and ONNX graphs; of an architecture, layers that change nothing.",
        may_not_follow=frozenset({"quantize"}),
        exports=("native", "onnx", "packed", "compressed-tensors", "pt2"),
        methods=(Fuse(),),
    ),
    Technique(
        name="quantize",
        family="quantization",
        title="Quantize to int8, to weights of few bits, to narrower floats, or to a codebook",
        needs="static: a `calibration` split (or train, or validation), labels not needed. dynamic: no data. codebook: "
        "a `train` split where `training` is given. weight_only: what static needs, with rtn and hqq no data. "
        "qat: a `train` split. mixed: what static needs. With max_accuracy_drop a labelled `validation` split besides. "
        "cast: no data. auto: what the method that it chooses needs.",
        applies_to="static: Linear, convolutions, Embedding, attention. dynamic: all but convolutions. codebook: what "
        "prune is for. weight_only: Linear, Conv1d, Conv2d, and Embedding where asked for. mixed: Linear, Conv1d, "
        "Conv2d. qat: Linear and convolutions, in a model that can be trained. cast: all floats, or, to float8, "
        "Linear, convolutions and attention.",
        devices=("cpu",),
        may_not_follow=frozenset({"quantize"}),
        exports=("native", "onnx", "packed", "compressed-tensors", "pt2"),
        methods=(
            Quantize(method="static"),
            Quantize(method="dynamic"),
            Codebook(),
            WeightOnly(algorithm="rtn"),
            Mixed(max_accuracy_drop=0.01),
            Qat(),
            Automatic(),
            Cast(),
        ),
    ),
)

BY_NAME: dict[str, Technique] = {technique.name: technique for technique in TECHNIQUES}


def check_order(spec: ResolvedSpec) -> None:
    """Raises OrderRefused, with the pointer of the later step, where two steps cannot follow each other."""
    for i, step in enumerate(spec.steps):
        for earlier in spec.steps[:i]:
            if (
                isinstance(earlier, Quantize | FewBits | Qat | Automatic | Cast)
                and earlier.technique in BY_NAME[step.technique].may_not_follow
            ):
                raise OrderRefused(
                    f"{step.technique} cannot follow {earlier.technique}: quantization freezes the weights, so it has "
                    "to be the last step. Move it to the end.",
                    pointer=spec.pointer(i),
                )
        if (
            isinstance(step, DistillStep)
            and step.student is not None
            and (lost := [one.technique for one in spec.steps[:i] if isinstance(one, Prune | RESTRUCTURING)])
        ):
            raise OrderRefused(
                f"distill with a student makes a new network, so what {lost[0]} did before is lost: put distill first.",
                pointer=spec.pointer(i),
            )
        if isinstance(step, RESTRUCTURING) and any(
            isinstance(one, Prune | Codebook | Compress) for one in spec.steps[:i]
        ):
            name = "Structured prune" if isinstance(step, StructuredPrune) else step.technique
            raise OrderRefused(
                f"{name} makes a new network, so what masks or shared values did before is lost: put it first.",
                pointer=spec.pointer(i),
            )
        if trainings_of(step) and any(isinstance(one, Fuse) and one.for_inference for one in spec.steps[:i]):
            raise OrderRefused(
                "By then dropout is gone, as fuse was asked for_inference: leave that out, or train before it.",
                pointer=spec.pointer(i),
            )
        if isinstance(step, FewBits | Qat) and any(isinstance(one, Codebook | Compress) for one in spec.steps[:i]):
            raise OrderRefused(
                f"The weights share values by then, which {step.method} would take away: leave out one of the two.",
                pointer=spec.pointer(i),
            )
        _check_delivered(step, spec.export)


def int8_exports(step: Step) -> tuple[str, ...]:
    """The artifacts that hold the integers of a step; none where it makes no int8 of activations too."""
    if isinstance(step, Quantize):
        return INT8_EXPORTS[step.method]
    return INT8_EXPORTS[step.method] if isinstance(step, Qat) and step.in_file else ()


def _check_delivered(step: Step, export: Sequence[str]) -> None:
    """Raises OrderRefused where no artifact that is asked for, or not every one, can hold what the step makes."""
    formats = int8_exports(step)
    if formats and not set(export).intersection(formats):
        assert isinstance(step, Quantize | Qat)
        raise OrderRefused(
            f"{step.technique} with method {step.method} is delivered as {' or '.join(formats)}: add "
            f"{' or '.join(map(repr, formats))} to export.",
            pointer="/export",
        )
    if isinstance(step, Mixed) and step.max_latency is not None and "onnx" not in export:
        raise OrderRefused(
            "max_latency is about products in ONNX Runtime: add 'onnx' to export, or limit max_size.", pointer="/export"
        )
    if isinstance(step, Quantize) and step.or_dynamic and "pt2" in export:
        raise OrderRefused(
            "or_dynamic may deliver dynamic int8, which pt2 has no form of: leave one of them out.", pointer="/export"
        )
