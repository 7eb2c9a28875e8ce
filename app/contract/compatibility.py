"""Whether a model, a dataset and the steps of a job fit each other; asked at submit and again before the job starts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from math import prod

from app.contract.augmentable import check_augmentable
from app.contract.cast import Cast
from app.contract.catalogue import check_order
from app.contract.choosing import COMPRESSED_TENSORS, settled
from app.contract.codebook import Codebook
from app.contract.compressed_tensors import check_compressed_tensors
from app.contract.compression import Compress
from app.contract.distillation import Student
from app.contract.errors import DatasetMismatch, InvalidSpec, ModelsMismatch, Unsupported, pointer_part
from app.contract.facts import DatasetFacts, ModelFacts, SplitFacts, TensorFacts
from app.contract.native import check_words
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.spec import RESTRUCTURING, DistillStep, Quantize, ResolvedSpec, Step, trainings_of
from app.contract.split_needs import check_splits
from app.contract.tasks import TASKS
from app.contract.weight_only import FewBits

_PRUNABLE = ("Linear", "NonDynamicallyQuantizableLinear", "Conv", "Embedding", "LSTM", "GRU", "MultiheadAttention")
_NAMES_SHOWN = 8  # enough layers to see how they are named


def check(spec: ResolvedSpec, model: ModelFacts, dataset: DatasetFacts | None) -> None:
    """Raises OrderRefused, DatasetMismatch, InvalidSpec or Unsupported: what was expected, what came, the field."""
    check_order(spec)
    if dataset is not None:
        check_pair(model, dataset)
    spec = settled(spec, model, dataset)
    check_order(spec)  # of what method auto has become
    check_splits(spec, dataset, model.task)
    replaced = False
    for index, step in enumerate(spec.steps):
        pointer = spec.pointer(index)
        if isinstance(step, DistillStep) and step.student is not None:
            _check_student(step.student, model, f"{pointer}/student")
            replaced = True
        for where, training in trainings_of(step).items():  # a student has the task and the inputs
            check_augmentable(training, model, dataset, f"{pointer}/{where}")
        if not replaced:  # else it is about a student, whose layers are not known yet: the worker asks
            check_step(step, model, pointer)
    if "pt2" in spec.export and not replaced and not model.trainable:
        raise Unsupported(
            f"A program of torch is made of what torch computes, and this graph runs as it is: export onnx instead. "
            f"{model.untrainable_reason}",
            pointer="/export",
        )
    check_words(spec, model)
    if COMPRESSED_TENSORS in spec.export:
        check_compressed_tensors(spec, None if replaced else model)


def _check_student(student: Student, model: ModelFacts, pointer: str) -> None:
    """A new network is described in the words that the model came in."""
    if student.kind == "model":
        return
    if model.format not in ("architecture", "huggingface"):
        raise Unsupported(
            "Students are made of an architecture or of a config of transformers, and the model came with neither. "
            "Give another uploaded model as the student.",
            pointer=pointer,
        )
    if student.kind == "architecture":
        wanted = "architecture" if model.format == "architecture" else "config"
        if getattr(student, wanted) is None:
            raise Unsupported(
                f"The model came with {'layers' if wanted == 'architecture' else 'a config'}, and so does its student: "
                f"give {wanted}.",
                pointer=pointer,
            )


def check_step(step: Step, model: ModelFacts, pointer: str) -> None:
    """Raises Unsupported or InvalidSpec unless the step finds in the model what it works on."""
    if isinstance(step, Prune | Codebook | Compress) and not any(
        layer.type.startswith(_PRUNABLE) for layer in model.layers
    ):
        what = "share values" if isinstance(step, Codebook) else "be pruned"
        raise Unsupported(f"The model has no layer with weights that can {what}.", pointer=pointer)
    if (trainings_of(step) or isinstance(step, RESTRUCTURING)) and not model.trainable:
        raise Unsupported(f"The model cannot be trained. {model.untrainable_reason}", pointer=pointer)
    if isinstance(step, Prune | Quantize | Codebook | Compress | FewBits | Qat | Cast | RESTRUCTURING):
        _check_patterns({f"exclude/{place}": pattern for place, pattern in enumerate(step.exclude)}, model, pointer)
    if isinstance(step, Prune):
        _check_patterns({f"layers/{pointer_part(pattern)}": pattern for pattern in step.layers}, model, pointer)


def check_named(
    spec: ResolvedSpec, model: ModelFacts, named: Mapping[str, ModelFacts], dataset: DatasetFacts | None
) -> None:
    """Raises ModelsMismatch, Unsupported or DatasetMismatch unless every other model that the steps name fits.

    `named` are those that have been inspected. Teachers and students answer the job's model's task, in its order of
    classes, and take its inputs.
    """
    pointers = spec.named_models()
    for id, facts in named.items():
        _check_alike(id, facts, model, pointers[id])
        if dataset is not None:
            try:
                check_pair(facts, dataset)
            except DatasetMismatch as mismatch:
                raise DatasetMismatch(f"{id}: {mismatch.detail}", pointer=pointers[id]) from None
    for step in spec.steps:
        if isinstance(step, DistillStep) and step.student is not None and step.student.kind == "model":
            facts = named.get(step.student.model, model)
            if not facts.trainable:
                raise Unsupported(
                    f"The student cannot be trained. {facts.untrainable_reason}", pointer=pointers[step.student.model]
                )


def _check_alike(id: str, other: ModelFacts, model: ModelFacts, pointer: str) -> None:
    if other.task != model.task:
        raise ModelsMismatch(f"{id} is a model for {other.task}; the job's is for {model.task}.", pointer=pointer)
    if other.classes != model.classes:
        raise ModelsMismatch(
            f"{id} gives {other.classes} outputs; the job's model gives {model.classes}.", pointer=pointer
        )
    if other.labels and model.labels and other.labels != model.labels:
        place = next(i for i, pair in enumerate(zip(other.labels, model.labels, strict=True)) if pair[0] != pair[1])
        raise ModelsMismatch(
            f"{id} calls its output {place} {other.labels[place]!r}; the job's model calls it {model.labels[place]!r}.",
            pointer=pointer,
        )
    same = len(other.inputs) == len(model.inputs) and all(map(_fits, model.inputs, other.inputs))
    if not same:
        raise ModelsMismatch(
            f"{id} takes {', '.join(map(_show, other.inputs))}; the job's model takes "
            f"{', '.join(map(_show, model.inputs))}.",
            pointer=pointer,
        )


def check_pair(model: ModelFacts, dataset: DatasetFacts) -> None:
    """Raises DatasetMismatch (pointer /dataset) unless each split can feed the model and targets are its classes."""
    if dataset.kind not in model.accepts:
        raise DatasetMismatch(
            f"The model takes {' or '.join(model.accepts)}; the dataset holds {dataset.kind}.", pointer="/dataset"
        )
    for name, split in dataset.splits.items():
        if dataset.kind == "arrays":
            _check_arrays(model, name, split)
        if dataset.kind == "images" and model.format != "huggingface":
            _check_pictures(model, name, split)
        _check_targets(model, name, split)
    if dataset.labels is not None and TASKS[model.task].names_classes:
        label_map(model, dataset)


def _check_targets(model: ModelFacts, name: str, split: SplitFacts) -> None:
    """Targets of another kind than the task's are refused, unless the task needs none; so are classes out of range."""
    wanted = TASKS[model.task].targets
    if wanted is None or split.targets is None:
        return
    if split.targets != wanted:
        raise DatasetMismatch(
            f"Split `{name}` has {split.targets} as targets; a {model.task} model learns from {wanted}.",
            pointer="/dataset",
        )
    if wanted == "values":
        _check_values(model, name, split)
    if not TASKS[model.task].names_classes:
        return
    if split.target_max is not None and split.target_max >= model.classes:
        raise DatasetMismatch(
            f"Split `{name}` has targets up to {split.target_max}; "
            f"the model has {model.classes} classes (0 to {model.classes - 1}).",
            pointer="/dataset",
        )
    if split.target_min is not None and split.target_min < 0:
        raise DatasetMismatch(f"Split `{name}` has the negative target {split.target_min}.", pointer="/dataset")


def _check_values(model: ModelFacts, name: str, split: SplitFacts) -> None:
    """Numbers in the shape of the output, and of labels nothing but 0 and 1."""
    if model.task == "multi-label" and not split.binary:
        raise DatasetMismatch(
            f"Split `{name}` has values other than 0 and 1; a multi-label model learns 0 or 1 a label.",
            pointer="/dataset",
        )
    output = model.outputs[0].shape if model.outputs else (model.classes,)
    if split.target_shape is None or None in output:
        return
    # A single number a sample may come without a dimension of its own.
    if prod(split.target_shape) != prod(size for size in output if size is not None):
        raise DatasetMismatch(
            f"Split `{name}` has values of shape {list(split.target_shape)} a sample; the model gives {list(output)}.",
            pointer="/dataset",
        )


def label_map(model: ModelFacts, dataset: DatasetFacts) -> tuple[int, ...]:
    """The model's class of each dataset label: by name where the names agree, else by order where the counts do.

    Raises DatasetMismatch where neither holds.
    """
    names = dataset.labels or ()
    known = {label: i for i, label in enumerate(model.labels or ())}
    if known and all(name in known for name in names):
        return tuple(known[name] for name in names)
    generic = not known or all(label.upper().startswith("LABEL_") for label in known)
    if generic and len(names) == model.classes:
        return tuple(range(len(names)))
    unknown = [name for name in names if name not in known][:5]
    raise DatasetMismatch(
        f"The dataset has {len(names)} labels and the model {model.classes}"
        + (f"; the model does not know {', '.join(map(repr, unknown))}" if known else "")
        + ". Name the folders or labels as the model does, or give `labels` in the model's spec.",
        pointer="/dataset",
    )


def _check_patterns(patterns: Mapping[str, str], model: ModelFacts, pointer: str) -> None:
    """A pattern, by the end of its pointer, that names no layer is most likely a misspelt one."""
    names = [layer.name for layer in model.layers]
    known = {way for name in names for way in (f"{name}.weight", *_and_holders(name))}
    for end, pattern in patterns.items():
        if not fnmatch.filter(known, pattern):
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
            raise InvalidSpec(
                f"{pattern!r} matches no layer. The model's layers are {shown}.", pointer=f"{pointer}/{end}"
            )


def _and_holders(name: str) -> list[str]:
    """A layer's name, and those of all that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _check_arrays(model: ModelFacts, name: str, split: SplitFacts) -> None:
    given = {tensor.name: tensor for tensor in split.inputs}
    if len(given) == len(model.inputs) == 1:
        pairs = [(model.inputs[0], split.inputs[0])]
    elif missing := [tensor.name for tensor in model.inputs if tensor.name not in given]:
        raise DatasetMismatch(
            f"Split `{name}` lacks the input {missing[0]!r}: "
            f"expected the arrays {', '.join(t.name for t in model.inputs)}.",
            pointer="/dataset",
        )
    else:
        pairs = [(tensor, given[tensor.name]) for tensor in model.inputs]
    for wanted, got in pairs:
        if not _fits(wanted, got):
            raise DatasetMismatch(
                f"Split `{name}` has samples of {_show(got)}; the model takes {_show(wanted)}.", pointer="/dataset"
            )


def _check_pictures(model: ModelFacts, name: str, split: SplitFacts) -> None:
    """Height and width as the model takes them: only a Hugging Face folder says how to resize."""
    wanted, got = model.inputs[0].shape[1:], split.inputs[0].shape[1:]
    if any(own is None or mine not in (None, own) for mine, own in zip(wanted, got, strict=True)):
        size = "different sizes" if None in got else f"{' x '.join(map(str, got))} (height x width)"
        takes = " x ".join("any" if side is None else str(side) for side in wanted)
        raise DatasetMismatch(
            f"Split `{name}` has pictures of {size}; the model takes {takes}. Resize them before the upload.",
            pointer="/dataset",
        )


def _fits(wanted: TensorFacts, got: TensorFacts) -> bool:
    same_kind = wanted.dtype.startswith("float") == got.dtype.startswith("float")
    return (
        same_kind
        and len(wanted.shape) == len(got.shape)
        and all(a is None or b is None or a == b for a, b in zip(wanted.shape, got.shape, strict=True))
    )


def _show(tensor: TensorFacts) -> str:
    return f"{tensor.dtype} [{', '.join('*' if d is None else str(d) for d in tensor.shape)}]"
