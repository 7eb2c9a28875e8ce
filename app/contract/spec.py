"""The job specification: a model, its data, and the ordered steps to take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from app.contract.automatic import Automatic
from app.contract.calibration import Calibration
from app.contract.cast import Cast
from app.contract.codebook import Codebook
from app.contract.compression import Compress
from app.contract.distillation import Distill, Student
from app.contract.factorizing import Factorize
from app.contract.fusing import Fuse
from app.contract.mixed import Mixed
from app.contract.pruning import Pattern, Prune
from app.contract.qat import Qat
from app.contract.resizing import OWN_METHODS, Resize
from app.contract.rewiring import Rewire
from app.contract.strict import Strict
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from app.contract.widths import ResizeWidth

MAX_STEPS = 16
MAX_METADATA_BYTES = 16_384
RANKED_ON = 64  # samples that tell which layers hurt most in int8

ExportFormat = Literal["native", "onnx", "packed", "compressed-tensors", "pt2"]


class Finetune(Strict):
    """Trains the model as it stands, keeping whatever earlier steps imposed on its weights."""

    technique: Literal["finetune"] = "finetune"
    training: Training = Field(default_factory=Training)


class DistillStep(Strict):
    """Trains a student with a teacher; what follows is about the student. Without one, the model as it stands."""

    technique: Literal["distill"] = "distill"
    student: Student | None = None
    training: Training = Field(Training(distill=Distill()), description="With `distill`, filled in where it is absent.")

    @model_validator(mode="after")
    def _taught(self) -> DistillStep:
        if self.training.distill is None:
            taught = self.training.model_copy(update={"distill": Distill()})
            object.__setattr__(self, "training", taught)
        distill = self.training.distill
        own = self.student.model if self.student is not None and self.student.kind == "model" else None
        if distill is not None and own in distill.teachers:
            raise ValueError("the student is one of its teachers: name another model")
        return self


class Quantize(Strict):
    """Stores weights as 8-bit integers and computes in integers where the runtime can. Delivered as ONNX, or,
    with method static, as a program of torch."""

    technique: Literal["quantize"] = "quantize"
    method: Literal["static", "dynamic"] = Field(
        "static",
        description="static: activation ranges from calibration data, all layers. "
        "dynamic: ranges at run time; convolutions stay floating point, which is faster there.",
    )
    dtype: Literal["int8"] = "int8"
    per_channel: bool = Field(True, description="One scale an output channel of the weights instead of one a tensor.")
    activations: Literal["auto", "uint8", "int8"] = Field("auto", description="auto: uint8 on x86, int8 elsewhere.")
    calibration: Calibration = Field(default_factory=Calibration, description="For method static.")
    smooth: bool = Field(
        True,
        description="For method static: whether channels that reach far are made smaller in front of matrix products, "
        "where that saves much (SmoothQuant, Xiao et al. 2023).",
    )
    equalize: bool = Field(
        True,
        description="For method static: whether factors are moved between layers, so that the weights that make a "
        "channel reach as far as those that read it, where that betters what the model gives (cross-layer "
        "equalization, Nagel et al. 2019).",
    )
    rounding: Literal["nearest", "adaptive"] = Field(
        "adaptive",
        description="Of weights, for method static, where per_channel. adaptive: so that what each layer gives changes "
        "least (the aim of AdaRound, Nagel et al. 2020).",
    )
    bias_correction: bool = Field(
        False,
        description="For method static: whether biases make up for what the mean of a layer's outputs moves by (Nagel "
        "et al. 2019).",
    )
    or_dynamic: bool = Field(
        False,
        description="For method static: whether a file by method dynamic is made as well, and delivered where it is "
        "the better one: nearer to the float model by a decibel and not much slower, or as near and faster.",
    )
    max_accuracy_drop: Annotated[
        float | None,
        Field(
            ge=0,
            le=1_000_000,
            description="By how much the task's metric on validation may be worse than the upload's: layers stay "
            "floating point, those first that hurt most, until the int8 file holds that. null: none does for that.",
        ),
    ] = None
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @field_validator("method", mode="before")
    @classmethod
    def _known(cls, method: object) -> object:
        """The other methods are steps of their own, and would not be named."""
        if method not in ("static", "dynamic"):
            raise ValueError(f"method is one of static, dynamic, {', '.join(OWN_STEPS)}")
        return method


# Methods of quantize that are steps of their own.
OWN_STEPS = ("weight_only", "mixed", "codebook", "qat", "cast", "auto")
STRUCTURED = "structured"  # the granularity of prune that is a step of its own
RESTRUCTURING = Factorize | StructuredPrune | Resize | ResizeWidth | Rewire | Fuse  # what takes a network apart


def _kind(step: Any) -> Any:
    """What tells steps apart: the technique; of quantize and resize the method where that is a step of its own, and of
    prune whether whole units go."""
    fields = step if isinstance(step, dict) else vars(step) if isinstance(step, Strict) else {}
    technique, method = fields.get("technique"), fields.get("method")
    if technique == "prune" and fields.get("granularity") == STRUCTURED:
        return STRUCTURED
    if technique == "resize" and method in OWN_METHODS:
        return method
    return method if technique == "quantize" and method in OWN_STEPS else technique


Step = Annotated[
    Annotated[Prune, Tag("prune")]
    | Annotated[StructuredPrune, Tag(STRUCTURED)]
    | Annotated[Finetune, Tag("finetune")]
    | Annotated[DistillStep, Tag("distill")]
    | Annotated[Quantize, Tag("quantize")]
    | Annotated[Codebook, Tag("codebook")]
    | Annotated[WeightOnly, Tag("weight_only")]
    | Annotated[Qat, Tag("qat")]
    | Annotated[Mixed, Tag("mixed")]
    | Annotated[Automatic, Tag("auto")]
    | Annotated[Cast, Tag("cast")]
    | Annotated[Compress, Tag("compress")]
    | Annotated[Factorize, Tag("factorize")]
    | Annotated[Resize, Tag("resize")]
    | Annotated[Rewire, Tag("connections")]
    | Annotated[ResizeWidth, Tag("width")]
    | Annotated[Fuse, Tag("fuse")],
    Discriminator(
        _kind,
        custom_error_type="technique",
        custom_error_message="technique is one of prune, finetune, distill, quantize, compress, factorize, resize "
        "and fuse",
    ),
]


def as_static(step: Qat) -> Quantize:
    """What becomes integers behind a training for 8 bits: of what did not train, ranges and steps are found as ever."""
    return Quantize(
        method="static",
        activations=step.activations,
        calibration=step.calibration,
        equalize=False,
        smooth=False,
        exclude=step.exclude,
    )


def trainings_of(step: Step) -> dict[str, Training]:
    """The step's trainings, in the order in which they run, by where in it they are (`lasso/training`)."""
    lasso = step.lasso if isinstance(step, StructuredPrune) else None
    found = {"lasso/training": lasso and lasso.training, "training": getattr(step, "training", None)}
    return {place: training for place, training in found.items() if isinstance(training, Training)}


class JobSpec(Strict):
    """A job as a client submits it: `recipe` or `steps`, not both."""

    model: Annotated[str, Field(pattern=r"^mdl_[0-9a-z]{26}$", examples=["mdl_01jd3m8s5q2v7x9z4b6c8d0e2f"])]
    dataset: Annotated[str | None, Field(pattern=r"^dst_[0-9a-z]{26}$")] = None
    recipe: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    steps: Annotated[tuple[Step, ...] | None, Field(min_length=1, max_length=MAX_STEPS)] = None
    export: Annotated[tuple[ExportFormat, ...], Field(min_length=1, max_length=8)] = ("native", "onnx")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    metadata: dict[str, Any] = Field(default_factory=dict, description="Anything; comes back with the job.")

    @model_validator(mode="after")
    def _recipe_or_steps(self) -> JobSpec:
        if (self.recipe is None) == (self.steps is None):
            raise ValueError("give recipe or steps, not both and not neither")
        if len(_crews(self.steps or ())) > 1:
            raise ValueError("trainings in several processes have to agree in hosts and processes; they differ in them")
        if len(set(self.export)) != len(self.export):
            raise ValueError("export names a format twice")
        if len(self.model_dump_json(include={"metadata"})) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is larger than {MAX_METADATA_BYTES} bytes")
        return self


class ResolvedSpec(Strict):
    """A job as it runs: the recipe unfolded, every default filled in."""

    model: str
    dataset: str | None
    recipe: str | None
    steps: tuple[Step, ...]
    export: tuple[ExportFormat, ...]
    seed: int

    @property
    def hosts(self) -> int:
        """How many workers take part in the job: as many as in its trainings, all else being for one."""
        return max((hosts for hosts, _ in _crews(self.steps)), default=1)

    @property
    def processes(self) -> int:
        """How many processes take part on each of them."""
        return max((processes for _, processes in _crews(self.steps)), default=1)

    def named_models(self) -> dict[str, str]:
        """The models that the steps name besides the job's own, by id, with the pointer of the first place."""
        found: dict[str, str] = {}
        for index, step in enumerate(self.steps):
            pointer = self.pointer(index)
            if isinstance(step, DistillStep) and step.student is not None and step.student.kind == "model":
                found.setdefault(step.student.model, f"{pointer}/student/model")
            for where, training in trainings_of(step).items():
                distill = training.distill
                for place, teacher in enumerate(distill.teachers if distill is not None else ()):
                    if distill is not None and teacher != "uploaded":
                        end = "" if isinstance(distill.teacher, str) else f"/{place}"
                        found.setdefault(teacher, f"{pointer}/{where}/distill/teacher{end}")
        return found

    def training_pointer(self, field: str) -> str:
        """The JSON pointer of a field of trainings, in the first that has it as the whole job does."""
        index, where = next(
            (index, where)
            for index, step in enumerate(self.steps)
            for where, training in trainings_of(step).items()
            if getattr(training, field) == getattr(self, field)
        )
        return self.pointer(index) + ("" if self.recipe is not None else f"/{where}/{field}")

    def pointer(self, index: int) -> str:
        """The JSON pointer of a step in what the client sent: a recipe's steps are not in it."""
        return "/recipe" if self.recipe is not None else f"/steps/{index}"


def _crews(steps: tuple[Step, ...]) -> set[tuple[int, int]]:
    """Hosts, and processes of each, of the trainings that are for more than one process."""
    trainings = [training for step in steps for training in trainings_of(step).values()]
    return {(training.hosts, training.processes) for training in trainings if training.ranks > 1}
