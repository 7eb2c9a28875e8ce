"""What a client says about an uploaded file: the model's task and, for plain weights, its architecture as JSON.

An architecture is data, never code: layers of an allow-list (`app.contract.layers`) that nest, add and join. The names
of its weights are those of the same nesting in `torch.nn.Sequential`: `0.weight`, `3.0.weight` in a nested Sequential,
`3.layers.0.weight` and `3.shortcut.0.weight` in a Residual, `3.branches.0.0.weight` in a Parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, Union

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from app.contract.errors import TersorError
from app.contract.facts import Task
from app.contract.layers import LAYERS, TABLE, Axis, Layer, Size
from app.contract.strict import Strict

MAX_LAYERS = 1000  # all nestings together; the deepest published convolutional networks have about this many
MAX_NESTING = 16  # Sequential in Residual in Parallel…; also keeps every recursion over a spec shallow
MAX_BRANCHES = 256
MAX_LABELS = 65_536
MAX_INPUT_ELEMENTS = 1 << 25  # of one sample: a 320³ volume; an inspection tries two, in less than 1 GB

# Layers whose output is no logit: as the last layer they would be applied twice, since the loss holds a softmax.
_NO_LOGITS = frozenset({"Softmax", "Sigmoid"})
_CONTAINERS = ("layers", "shortcut", "branches")

if TYPE_CHECKING:
    AnyLayer: TypeAlias = Layer
else:
    AnyLayer = Annotated[Union[(*LAYERS, "Sequential", "Residual", "Parallel")], Field(discriminator="type")]

Layers: TypeAlias = tuple[AnyLayer, ...]
SpecT = TypeVar("SpecT", bound=Strict)


class Sequential(Layer):
    """Layers one after the other."""

    type: Literal["Sequential"]
    layers: Annotated[Layers, Field(min_length=1, max_length=MAX_LAYERS)]


class Residual(Layer):
    """layers(x) + shortcut(x); without `shortcut`, layers(x) + x."""

    type: Literal["Residual"]
    layers: Annotated[Layers, Field(min_length=1, max_length=MAX_LAYERS)]
    shortcut: Annotated[Layers, Field(max_length=MAX_LAYERS)] = ()


class Parallel(Layer):
    """Every branch on the same input; the outputs are concatenated along `dim` or added."""

    type: Literal["Parallel"]
    branches: Annotated[
        tuple[Annotated[Layers, Field(max_length=MAX_LAYERS)], ...], Field(min_length=1, max_length=MAX_BRANCHES)
    ]
    join: Literal["concat", "add"] = "concat"
    dim: Axis = Field(1, description="Of the concatenation; 1 is channels or features.")


class Architecture(Strict):
    """A network as a list of layers."""

    layers: Annotated[Layers, Field(min_length=1, max_length=MAX_LAYERS)]

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        """Counts layers and nesting before anything recurses into them."""
        count, depth = _extent(value)
        if count > MAX_LAYERS:
            raise ValueError(f"an architecture has at most {MAX_LAYERS} layers; this one has {count} or more")
        if depth > MAX_NESTING:
            raise ValueError(f"layers nest at most {MAX_NESTING} deep")
        return value

    @model_validator(mode="after")
    def _ends_in_logits(self) -> Architecture:
        last: Layer = self.layers[-1]
        while isinstance(last, Sequential):
            last = last.layers[-1]
        if last.type in _NO_LOGITS:
            raise ValueError(f"the last layer is {last.type}: leave it out, a model's output is logits")
        return self


class InputSpec(Strict):
    """One sample: its shape without the batch dimension, and its dtype. int64 holds token ids."""

    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=5, examples=[[1, 28, 28]])]
    dtype: Literal["float32", "int64"] = "float32"

    @field_validator("shape")
    @classmethod
    def _moderate(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if prod(shape) > MAX_INPUT_ELEMENTS:
            raise ValueError(f"one sample has at most {MAX_INPUT_ELEMENTS} elements; this shape has {prod(shape)}")
        return shape


class ModelSpec(Strict):
    """The `spec` of an uploaded model. Plain weights need `task`, `architecture` and `input`, or `config`.

    A Hugging Face folder says all of it itself: its `config.json` names the task, the labels and the inputs.
    """

    task: Task | None = None
    architecture: Architecture | None = None
    input: InputSpec | None = None
    config: dict[str, Any] | None = Field(None, description="The config.json of transformers, for plain weights.")
    labels: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None,
        Field(min_length=1, max_length=MAX_LABELS, description="Names of the classes, in the order of the outputs."),
    ] = None

    @model_validator(mode="after")
    def _complete(self) -> ModelSpec:
        if self.architecture is not None and self.task is None:
            raise ValueError("an architecture needs a task, such as image-classification")
        if self.architecture is not None and self.input is None:
            raise ValueError('an architecture needs its input: {"shape": [1, 28, 28], "dtype": "float32"}')
        if self.architecture is not None and self.config is not None:
            raise ValueError("give architecture or config, not both: each describes the layers")
        if self.architecture is None and self.input is not None:
            raise ValueError("input describes an architecture; without one the file itself says what it takes")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names a class twice")
        return self


class SplitSpec(Strict):
    """How a dataset that comes as one split is divided: shares of `validation` and `test`; the rest is `train`."""

    validation: Annotated[float, Field(ge=0, lt=1, description="Share of the samples.")] = 0.1
    test: Annotated[float, Field(ge=0, lt=1, description="Share of the samples.")] = 0.1
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0

    @model_validator(mode="after")
    def _some_left(self) -> SplitSpec:
        if self.held_out >= 1:
            raise ValueError("validation and test together leave nothing to train on: their shares have to be below 1")
        return self

    @property
    def held_out(self) -> float:
        """The share that is not trained on; 0 where nothing is to be divided."""
        return self.validation + self.test


class DatasetSpec(Strict):
    """The `spec` of an uploaded dataset. The file says the rest of it itself."""

    split: SplitSpec = Field(
        SplitSpec(),
        description="For a dataset of one split, train or unnamed, of ten samples or more; false leaves it whole.",
        json_schema_extra={"examples": [False, {"validation": 0.1, "test": 0.1, "seed": 0}]},
    )

    @field_validator("split", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return SplitSpec(validation=0, test=0) if value is False else value

    @field_serializer("split")
    def _as_sent(self, split: SplitSpec) -> dict[str, Any] | bool:
        return split.model_dump(exclude_unset=True) if split.held_out else False


def model_spec(spec: dict[str, Any], error: type[TersorError]) -> ModelSpec:
    """Parses a model's spec. Raises `error` with the first faults as sentences and the first one's JSON pointer."""
    return _parse(ModelSpec, spec, error)


def dataset_spec(spec: dict[str, Any], error: type[TersorError]) -> DatasetSpec:
    """Parses a dataset's spec. Raises `error` as `model_spec` does."""
    return _parse(DatasetSpec, spec, error)


def _parse(kind: type[SpecT], spec: dict[str, Any], error: type[TersorError]) -> SpecT:
    try:
        return kind.model_validate(spec)
    except ValidationError as failure:
        faults = failure.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(f"{_path(fault['loc'])}: {fault['msg']}" for fault in faults[:5])
        raise error(f"The spec is not valid. {said}.", pointer=_pointer(faults[0]["loc"])) from None


def _path(location: tuple[int | str, ...]) -> str:
    """spec.architecture.layers[3].Conv2d.stride"""
    return "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _pointer(location: tuple[int | str, ...]) -> str:
    """A location as a JSON pointer into the spec: the layer types that the discriminator adds are no keys of it."""
    tags = {*TABLE, "Sequential", "Residual", "Parallel"}
    return "".join(f"/{part}" for part in location if part not in tags)


def _extent(value: Any) -> tuple[int, int]:
    """Layers and nesting of a raw architecture, without recursion, and no further than the caps."""
    count, deepest = 0, 0
    pending = [(value, 0)]
    while pending and count <= MAX_LAYERS and deepest <= MAX_NESTING:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        for layer in _children(node):
            count += 1
            pending.append((layer, depth + 1))
    return count, deepest


def _children(node: Any) -> Iterator[Any]:
    if not isinstance(node, dict):
        return
    for key in _CONTAINERS:
        entries = node.get(key)
        if not isinstance(entries, list | tuple):
            continue
        for entry in entries:
            yield from entry if isinstance(entry, list | tuple) else (entry,)


for _container in (Sequential, Residual, Parallel, Architecture):
    _container.model_rebuild()
