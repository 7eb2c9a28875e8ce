"""Distillation: who teaches, what of the teacher a student is to match, and which student it is.

Without layers named, the losses on features choose them by themselves (`worker.training.distilling.mapping`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from app.contract.architecture import Architecture
from app.contract.strict import Strict

MAX_TEACHERS = 8  # all of them lie in memory at once
MAX_LOSSES = 8
MAX_PAIRS = 256
GIB = 1 << 30

ModelId = Annotated[str, Field(pattern=r"^mdl_[0-9a-z]{26}$", examples=["mdl_01jd3m8s5q2v7x9z4b6c8d0e2f"])]
LayerName = Annotated[str, Field(min_length=1, max_length=256)]
Weight = Annotated[float, Field(gt=0, le=1e6, description="Factor of this loss in their sum.")]
Pairs = Annotated[
    tuple[tuple[LayerName, LayerName], ...] | None,
    Field(min_length=1, max_length=MAX_PAIRS, description="Names of layers, [student's, teacher's]; null: found."),
]
Share = Annotated[float, Field(gt=0, lt=1)]


class SoftTargets(Strict):
    """T^2 * KL(teacher || student) of the softened outputs (Hinton, Vinyals & Dean 2015).

    On language models this is word-level distillation, a distribution a token (Kim & Rush 2016). Tasks without classes
    follow the teacher's values or vectors.
    """

    kind: Literal["soft_targets"] = "soft_targets"
    weight: Weight = 1.0


class Decoupled(Strict):
    """DKD (Zhao et al. 2022): the target class and the others on their own, T^2 * (target * TCKD + others * NCKD)."""

    kind: Literal["decoupled"] = "decoupled"
    weight: Weight = 1.0
    target: Annotated[float, Field(ge=0, le=1e3, description="Weight of TCKD, the paper's alpha.")] = 1.0
    others: Annotated[float, Field(ge=0, le=1e3, description="Weight of NCKD, the paper's beta.")] = 8.0


class HiddenStates(Strict):
    """Mean squared error of layers' outputs (FitNets, Romero et al. 2014; TinyBERT, Jiao et al. 2019).

    Where student and teacher differ in width, a projection is learned along with the student and thrown away.
    """

    kind: Literal["hidden_states"] = "hidden_states"
    weight: Weight = 1.0
    layers: Pairs = None
    projection: Literal["auto", "linear"] = Field("auto", description="linear: also between equal widths.")


class AttentionMaps(Strict):
    """Where a network looks.

    Convolutions: the squared activations summed over the channels, as a unit vector (Zagoruyko & Komodakis 2016).
    transformers: the attention probabilities (Jiao et al. 2019), averaged over the heads where their numbers differ.
    """

    kind: Literal["attention_maps"] = "attention_maps"
    weight: Weight = 1.0
    layers: Pairs = None


class Relational(Strict):
    """RKD (Park et al. 2019): how far samples of a batch lie from each other, and at which angles."""

    kind: Literal["relational"] = "relational"
    weight: Weight = 1.0
    distance: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    angle: Annotated[float, Field(ge=0, le=1e3)] = 2.0
    layers: Annotated[Pairs, Field(max_length=1)] = None


class Contrastive(Strict):
    """InfoNCE over a batch (van den Oord, Li & Vinyals 2018), student against teacher as in CRD (Tian et al. 2019).

    The student's vector of a sample is to be nearer to the teacher's of the same sample than to those of the others.
    """

    kind: Literal["contrastive"] = "contrastive"
    weight: Weight = 1.0
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.07
    layers: Annotated[Pairs, Field(max_length=1)] = None


class Sequence(Strict):
    """Sequence-level distillation (Kim & Rush 2016): the task's own loss on what the teacher says.

    Causal language models learn the teacher's continuation of the first `prompt` tokens of each text, speech
    recognition its transcript; both as the teacher's likeliest next token each time.
    """

    kind: Literal["sequence"] = "sequence"
    weight: Weight = 1.0
    prompt: Annotated[int, Field(ge=1, le=4096, description="Tokens of the text that the teacher is given.")] = 16
    tokens: Annotated[int, Field(ge=1, le=4096, description="Tokens that the teacher adds.")] = 32


Loss: TypeAlias = Annotated[
    SoftTargets | Decoupled | HiddenStates | AttentionMaps | Relational | Contrastive | Sequence,
    Field(discriminator="kind"),
]


class Cache(Strict):
    """The teacher's answers on disk, computed once where a sample is the same each time it comes."""

    max_bytes: Annotated[int, Field(ge=0, le=1 << 50, description="0 turns it off.")] = 16 * GIB
    dtype: Literal["float16", "float32"] = Field("float16", description="float16: half the bytes, three digits.")


class Distill(Strict):
    """Knowledge distillation (Hinton, Vinyals & Dean 2015).

    The loss is alpha * (the sum of weight * loss over `losses`) + (1 - alpha) * the task's loss; without targets
    alpha is 1.
    """

    teacher: (
        Literal["uploaded"]
        | ModelId
        | Annotated[tuple[Literal["uploaded"] | ModelId, ...], Field(min_length=1, max_length=MAX_TEACHERS)]
    ) = Field(
        "uploaded",
        description="The model as it was uploaded, another uploaded model, or several: an ensemble answers with the "
        "mean of its softened probabilities, and its first member shows its layers.",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1, description="Weight of what the teacher says.")] = 0.7
    losses: Annotated[tuple[Loss, ...], Field(min_length=1, max_length=MAX_LOSSES)] = (SoftTargets(),)
    cache: Cache = Cache()

    @model_validator(mode="after")
    def _distinct(self) -> Distill:
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError("teacher names a model twice")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        """Every teacher, in order."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher


class AutoStudent(Strict):
    """A narrower or shallower copy of the model as it stands, started from its weights, as large as the budget allows.

    Give at most one share of what the model has now; a quarter of its parameters unless another is given.
    """

    kind: Literal["auto"]
    parameters: Share | None = None
    macs: Share | None = None
    latency: Annotated[Share | None, Field(description="Of one sample in torch, measured while searching.")] = None
    shrink: Literal["auto", "width", "depth"] = Field(
        "auto", description="auto: both, in equal shares, where the network has layers to leave out."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, value: Any) -> Any:
        if isinstance(value, dict):
            given = [name for name in ("parameters", "macs", "latency") if value.get(name) is not None]
            if len(given) > 1:
                raise ValueError(f"give one budget: parameters, macs or latency, not {' and '.join(given)}")
            if not given:
                return {**value, "parameters": 0.25}
        return value


class ModelStudent(Strict):
    """Another uploaded model."""

    kind: Literal["model"]
    model: ModelId


class ArchitectureStudent(Strict):
    """A new network: layers as of an uploaded `architecture`, or a `config` of transformers. Weights begin at random.

    Task, labels and inputs are the uploaded model's. A config is that of a model that came as a Hugging Face folder,
    whose tokenizer or processor the student takes over, or as weights with a config.
    """

    kind: Literal["architecture"]
    architecture: Architecture | None = None
    config: dict[str, Any] | None = Field(None, description="A config.json of transformers.")

    @model_validator(mode="after")
    def _one_description(self) -> ArchitectureStudent:
        if (self.architecture is None) == (self.config is None):
            raise ValueError("give exactly one of architecture and config")
        return self


Student: TypeAlias = Annotated[AutoStudent | ModelStudent | ArchitectureStudent, Field(discriminator="kind")]
