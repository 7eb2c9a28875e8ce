"""How long a job will take and how much memory it needs, roughly: from what the inspection measured."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pydantic import BaseModel, ConfigDict, Field

from app.contract.catalogue import int8_exports
from app.contract.compression import Compress
from app.contract.distillation import AutoStudent, ModelStudent, Student
from app.contract.factorizing import Factorize
from app.contract.facts import Cost, DatasetFacts, ModelFacts, calibration_split
from app.contract.mixed import MOST_TRIED, Mixed
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.spec import RANKED_ON, DistillStep, Quantize, ResolvedSpec, Step, as_static, trainings_of
from app.contract.structured import BY_GRADIENTS, StructuredPrune
from app.contract.tasks import evaluation_split
from app.contract.training import Training
from app.contract.weight_only import FewBits
from app.contract.widths import ResizeWidth, TakesUnits

# A backward pass costs about two forward ones.
TRAINING_PASSES = 3
# Of static int8, as worker/techniques/quantization/static/quantizer.py has it: how many files are made and judged where
# the method of calibration is to be found, and how often the samples go through a graph to judge one, and through one
# that factors were moved in, whose ranges are found first.
FILES_TRIED, JUDGING_PASSES, FACTORS_PASSES = 3, 2, 3
ROUNDED_A_SECOND = 1e6  # weights, by adaptive rounding
# Of qat with 8 bits: layers that have their steps by then, and what training keeps, which is what came into a layer and
# what that was rounded to.
STEPS_LEARNED = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
ROUNDED_COPIES = 2
# Of variational pruning: passes with noise over those without, and what it holds for each weight: a variance, its
# gradient and moments, and what its cost keeps for the way back.
NOISE_PASSES, NOISE_COPIES = 2.0, 8
INPUT_PASSES = 3.0  # to see what comes in, to go on with what went out, and for the columns of layers that are rounded
# What a job takes besides: starting, reading, verifying and measuring, and the export of one artifact.
FIXED_SECONDS, EXPORT_SECONDS = 4.0, 3.0
COMPILE_SECONDS = 40.0  # of a program of integers or codes, by torch, for the report
# An export holds the module, its graph, the file's message and its bytes.
EXPORT_COPIES = 4
MEASURED = ("Linear", "Conv1d", "Conv2d", "Conv1D")  # layers that method mixed rounds one by one
LEVELS_MEASURED = 3  # shares of a group's units without which the outputs are looked at
WIDTHS_TRIED = 12  # of one for all layers, that a budget is met by
FACTORS_MEASURED = 4  # products of a layer whose effect on the outputs is measured
WAYS, TRIED = 2, 10  # residual branches of a block, and passes of a sample to try one: with it and without, of 2 and 3
ROUNDS_DOWN, ROUNDS_BEHIND = 6, 6  # of a search that ended
CODED = 1.5  # half as much again for the training of a round's values
PRODUCT_SECONDS = 2.0  # to find out how long small products of one shape take, in all bits
PRODUCT_RUNS = 150  # of each, for large ones
LARGE_BATCH = 512  # larger ones gained nothing on the processors that were tried
RUNTIME_BYTES = 540 << 20  # what a job on a network of nothing was seen to hold: torch, onnxruntime, the exporter


class Estimate(BaseModel):
    """Rough: within a small factor on a quiet worker like the one that inspected the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    memory_bytes: int = Field(description="At the job's peak, with its runtime, on one worker.")


def estimate(
    spec: ResolvedSpec, model: ModelFacts, dataset: DatasetFacts | None, named: Mapping[str, ModelFacts] | None = None
) -> Estimate:
    """The estimate of a job that was checked already. `model` and those that are `named` must have their cost.

    A student of its own kind is taken to cost its share of the budget, a described one as much as the model.
    """
    assert model.cost is not None
    cost = model.cost
    costs = {id: facts.cost for id, facts in (named or {}).items() if facts.cost is not None}
    passes, seconds, share = 0.0, 0.0, 1.0
    needs = [cost.inference_bytes, EXPORT_COPIES * cost.weight_bytes]
    for step in spec.steps:
        if isinstance(step, DistillStep) and step.student is not None:
            share = _share(step.student, cost, costs)
        for where, training in trainings_of(step).items():
            rounds = CODED * (ROUNDS_DOWN + ROUNDS_BEHIND * step.longer) if isinstance(step, Compress) else 1.0
            rounds *= step.rounds if isinstance(step, Prune) and step.rewind is not None else 1
            rounds *= step.rounds if isinstance(step, StructuredPrune) and where == "training" else 1
            noisy = isinstance(step, Compress) or (isinstance(step, Prune) and step.criterion == "variational")
            rounds *= NOISE_PASSES if noisy else 1
            passes += rounds * share * _training_passes(training, dataset)
            passes += rounds * _teacher_passes(training, model, dataset, costs)
            copies = ROUNDED_COPIES if isinstance(step, Qat) and step.in_file else 1
            others = sum(one.weight_bytes for one in costs.values()) + noisy * NOISE_COPIES * cost.weight_bytes
            needs.append(_training_bytes(training, cost, others, copies))
        if "pt2" in spec.export and ("pt2" in int8_exports(step) or isinstance(step, FewBits | Qat)):
            seconds += COMPILE_SECONDS
        if isinstance(step, Quantize) and step.method == "static":
            passes += static_passes(step) * _looked_at(step, dataset)
            seconds += _rounding_seconds(step, model)
        if isinstance(step, Qat) and step.in_file:  # behind a look at the ranges that the training begins with
            static = as_static(step)
            passes += (_range_passes(static) + static_passes(static)) * _looked_at(static, dataset)
            seconds += _rounding_seconds(static, model, STEPS_LEARNED)
        if isinstance(step, Quantize) and step.max_accuracy_drop is not None:
            passes += len(model.layers) * min(RANKED_ON, _samples(dataset, calibration_split(dataset)))
            passes += (3 + len(model.layers).bit_length()) * _samples(dataset, "validation")
        if isinstance(step, Mixed) and step.max_latency is not None:
            shapes = {layer.parameters for layer in model.layers if layer.type in ("Linear", "Conv1D")}
            seconds += PRODUCT_SECONDS * len(shapes)
            passes += PRODUCT_RUNS
        passes += _choosing_passes(step, model, dataset)
    evaluated = _samples(dataset, evaluation_split(dataset, model.task))
    passes += evaluated * (1 + len(spec.export))
    return Estimate(
        seconds=FIXED_SECONDS + EXPORT_SECONDS * len(spec.export) + seconds + passes * cost.seconds,
        memory_bytes=RUNTIME_BYTES + max(needs),
    )


def _choosing_passes(step: Step, model: ModelFacts, dataset: DatasetFacts | None) -> float:
    """For what a step looks at before it chooses."""
    match step:
        case FewBits():
            return _few_bits_passes(step, model, dataset)
        case StructuredPrune():
            return _structured_passes(step, model, dataset)
        case Factorize():
            return _factorizing_passes(step, model, dataset)
        case Resize():
            return _resizing_passes(step, step.layers, _blocks(model), dataset)
        case ResizeWidth():
            return _width_passes(step, model, dataset)
        case Rewire():
            ways = WAYS * _blocks(model)
            return TRIED * ways + _resizing_passes(step, step.connections, ways, dataset)
        case _:
            return 0.0


def _few_bits_passes(step: FewBits, model: ModelFacts, dataset: DatasetFacts | None) -> float:
    """Of an algorithm that looks at inputs, once or for each rounding that a search tries, which is then judged; and
    of the measurement of each layer."""
    given = _samples(dataset, calibration_split(dataset))
    once = INPUT_PASSES * min(step.samples, given) if step.looks_at_inputs else 0.0
    if not isinstance(step, Mixed):
        return once
    layers = sum(layer.type in MEASURED for layer in model.layers)
    measured = once + layers * len(step.bits) * min(step.measured_on(model.parameters, layers), given)
    if step.max_accuracy_drop is None:
        return 2 * once + measured  # held against equal bits everywhere
    return measured + MOST_TRIED * (once + _samples(dataset, "validation"))


def _factorizing_passes(step: Factorize, model: ModelFacts, dataset: DatasetFacts | None) -> float:
    """For what comes into layers, for gradients, and for what each layer does to the outputs."""
    given = min(step.samples, _samples(dataset, calibration_split(dataset)))
    passes = INPUT_PASSES * given if step.criterion == "activations" else 0.0
    if step.criterion == "fisher":
        passes += TRAINING_PASSES * min(step.samples, _samples(dataset, "train"))
    layers = sum(layer.type in MEASURED for layer in model.layers)
    return passes + (layers * FACTORS_MEASURED * given if step.allocation == "measured" else 0.0)


def _resizing_passes(step: Resize | Rewire, asked: int | None, parts: int, dataset: DatasetFacts | None) -> float:
    """For what parts do or for gradients, once; greedily for every part that is left, as often as one goes."""
    if step.criterion == "taylor":
        return TRAINING_PASSES * min(step.samples, _samples(dataset, "train"))
    given = min(step.samples, _samples(dataset, calibration_split(dataset)))
    if step.criterion == "cosine":
        return given
    gone = min(parts, asked or parts if step.budget is None else round((1 - step.budget.limit[1]) * parts))
    return given * (1.0 + gone * parts - gone * (gone - 1) / 2)


def _blocks(model: ModelFacts) -> int:
    """Most are entries of a list, and no layer's name says which are."""
    return len({found[0] for layer in model.layers if (found := re.match(r".*?\d+(?=\.)", layer.name))})


def _structured_passes(step: StructuredPrune, model: ModelFacts, dataset: DatasetFacts | None) -> float:
    """In every round for gradients or inputs, for statistics of batch norms, and for those and outputs without parts
    of each group."""
    given = min(step.samples, _samples(dataset, calibration_split(dataset)))
    passes = (1.0 + (step.criterion == "activations")) * step.rounds * given
    if step.criterion in BY_GRADIENTS:
        passes += step.rounds * TRAINING_PASSES * min(step.samples, _samples(dataset, "train"))
    if step.scope == "auto":
        passes += 2 * step.rounds * len(model.layers) * LEVELS_MEASURED * given
    return passes + step.rounds * _reconstructing_passes(step, model, given)


def _width_passes(step: ResizeWidth, model: ModelFacts, dataset: DatasetFacts | None) -> float:
    """For gradients or inputs, for layers that are fitted again and statistics of batch norms, and all that and outputs
    for each candidate; a search that looks at narrower networks is counted as if these were as wide."""
    given = min(step.samples, _samples(dataset, calibration_split(dataset)))
    passes = (1.0 + (step.criterion == "activations")) * given + (WIDTHS_TRIED if step.budget is not None else 0)
    if step.criterion in BY_GRADIENTS:
        passes += TRAINING_PASSES * min(step.samples, _samples(dataset, "train"))
    renewed = _reconstructing_passes(step, model, given)
    return passes + renewed + (step.candidates * (2 * given + renewed) if step.search == "evolutionary" else 0.0)


def _reconstructing_passes(step: TakesUnits, model: ModelFacts, given: int) -> float:
    """For what layers gave and read: both networks up to each of them, half of one on the average, or through the
    blocks of transformers."""
    layers = sum(layer.type in MEASURED for layer in model.layers)
    rows = _blocks(model) if model.format == "huggingface" else 1
    return step.reconstructs * given * layers / max(1, rows)


def _looked_at(step: Quantize, dataset: DatasetFacts | None) -> int:
    """Calibration samples."""
    return min(step.calibration.samples, _samples(dataset, calibration_split(dataset)))


def _range_passes(step: Quantize) -> int:
    """Limits, and histograms between them."""
    return 1 if step.calibration.method == "minmax" else 2


def static_passes(step: Quantize) -> int:
    """How often the calibration samples go through a graph, if everything that may be tried is."""
    passes = JUDGING_PASSES * (FILES_TRIED if step.calibration.method == "auto" else 1)
    passes += _range_passes(step)
    passes += step.per_channel and (step.rounding == "adaptive" or step.bias_correction)
    passes += 2 * JUDGING_PASSES * step.or_dynamic
    ways = step.equalize + step.smooth
    return passes + step.smooth + (FACTORS_PASSES * (1 + ways) if ways else 0)


def _rounding_seconds(step: Quantize, model: ModelFacts, settled: Collection[str] = ()) -> float:
    """Layers of the types that are `settled` have their steps by then."""
    if not step.per_channel or step.rounding == "nearest":
        return 0.0
    left = (layer.parameters for layer in model.layers if layer.type not in ("Embedding", *settled))
    return sum(left) / ROUNDED_A_SECOND


def _training_bytes(training: Training, cost: Cost, others: int, copies: int) -> int:
    """What a training holds on one worker, in all of its processes there; `others` are the weights of teachers, and of
    activations there are so many `copies`."""
    shares = training.ranks if training.sharded else 1
    averaged = cost.weight_bytes if training.averaging is not None else 0
    each = (cost.training_bytes + averaged) // shares + others
    at_once = _batch_size(training) // training.hosts
    if training.micro_batch_size is not None:
        at_once = min(at_once, training.micro_batch_size * training.processes)
    return training.processes * each + at_once * copies * cost.activation_bytes


def _training_passes(training: Training, dataset: DatasetFacts | None) -> float:
    """Forward passes of one sample that a training is worth."""
    train = _samples(dataset, "train")
    samples = training.steps * _batch_size(training) if training.steps else (training.epochs or 1) * train
    passes: float = samples * TRAINING_PASSES * (1 + (training.search.budget if training.automatic else 0))
    if training.judges and train:
        passes += samples / train * _samples(dataset, "validation")
    if training.averaging is not None and training.averaging.kind == "swa":
        passes += train  # for the statistics of BatchNorm
    return passes


def _teacher_passes(
    training: Training, model: ModelFacts, dataset: DatasetFacts | None, costs: Mapping[str, Cost]
) -> float:
    """Those of the teachers, in passes of the model: once a sample where answers are kept, else each time."""
    distill = training.distill
    if distill is None:
        return 0.0
    assert model.cost is not None
    train = _samples(dataset, "train")
    samples = training.steps * _batch_size(training) if training.steps else (training.epochs or 1) * train
    if distill.cache.max_bytes and model.task != "masked-lm" and training.augmentation is None:
        samples = min(samples, train)
    own = model.cost.seconds or 1.0
    return samples * sum(costs[name].seconds / own if name in costs else 1.0 for name in distill.teachers)


def _share(student: Student, cost: Cost, costs: Mapping[str, Cost]) -> float:
    """The student's cost of a sample over the model's."""
    match student:
        case AutoStudent():
            return student.parameters or student.macs or student.latency or 1.0
        case ModelStudent():
            return costs[student.model].seconds / (cost.seconds or 1.0) if student.model in costs else 1.0
        case _:
            return 1.0


def _batch_size(training: Training) -> int:
    """A large one, where it is still to be found."""
    return LARGE_BATCH if training.batch_size == "auto" else training.batch_size


def _samples(dataset: DatasetFacts | None, split: str | None) -> int:
    if dataset is None or split is None or split not in dataset.splits:
        return 0
    return dataset.splits[split].samples
