"""What a client must not overlook: got slower, less accurate or no smaller, or is not what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.contract.cast import Cast
from app.contract.catalogue import INT8_EXPORTS
from app.contract.compression import Compress
from app.contract.facts import DatasetFacts, ModelFacts, made_splits
from app.contract.mixed import Mixed
from app.contract.native import STAND_IN
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.report import ArtifactReport, Measurement, Metric, StepReport
from app.contract.spec import Quantize, ResolvedSpec, Step, trainings_of
from app.contract.tasks import TASKS
from app.contract.weight_only import FewBits
from worker.loading.onnx_constants import IN_A_BRANCH
from worker.techniques.quantization.quantize import CONVOLUTIONS

# Medians of the same file, measured twice on a shared machine, differ by up to a tenth.
NOISE = 0.9
# A file within 2 % of the upload's size differs by its header only.
SAME_SIZE = 1.02
# Metrics that are no shares of a whole.
UNBOUNDED = ("perplexity", "log_loss", "mean_squared_error", "root_mean_squared_error", "mean_absolute_error", "r2")
FEW_BITS = ("weight_only", "mixed", "qat")  # methods whose codes an artifact may hold as floats
MOST_BITS = 8  # of codes; more are floats
NAMED = 5  # layers, of those that a sentence is about
# By so much another metric has to get worse, and the task's own by less than half of it, to be worth a word.
MARKED = 0.02


def warnings(
    spec: ResolvedSpec,
    facts: ModelFacts,
    dataset: DatasetFacts | None,
    uploaded: Measurement,
    artifacts: Sequence[ArtifactReport],
    steps: Sequence[StepReport] = (),
) -> tuple[str, ...]:
    """Sentences, the worst first."""
    found: list[str] = [*_not_held(artifacts, steps), *_missed(artifacts)]
    for judge in (_slower, _less_accurate, _worse_elsewhere, _not_smaller):
        found.extend(sentence for artifact in artifacts for sentence in judge(artifact, uploaded, spec))
    if uploaded.metric is None:
        name = TASKS[facts.task].metric.replace("_", " ")
        found.append(f"The {name} was not measured: the job has no dataset with a labelled test or validation split.")
    elif uploaded.metric.split == "validation" and any(_chooses(step) for step in spec.steps):
        found.append(
            f"The {uploaded.metric.name.replace('_', ' ')} was measured on the validation split, by which the "
            "weights were chosen (early stopping, compress, max_accuracy_drop), and is flattered by that. Give the "
            "dataset a test split."
        )
    found.extend(sentence for number, step in enumerate(steps, 1) for sentence in _diverged(number, step))
    found.extend(_not_as_asked(spec, facts, artifacts, steps))
    if (made := made_splits(dataset)) is not None:
        found.append(made)
    return tuple(dict.fromkeys(found))  # two artifacts may have the same to tell


def _chooses(step: Step) -> bool:
    """Whether the step looks at the validation split to choose what it leaves."""
    if isinstance(step, Compress) or (isinstance(step, Quantize | Mixed) and step.max_accuracy_drop is not None):
        return True
    return any(training.early_stopping is not None for training in trainings_of(step).values())


def _diverged(number: int, step: StepReport) -> Iterator[str]:
    """A training that was saved by a lower rate than the client asked for."""
    incidents = step.details.get("training_diverged")
    if not isinstance(incidents, list) or not incidents:
        return
    times = "once" if len(incidents) == 1 else f"{len(incidents)} times"
    first = incidents[0]
    yield (
        f"The training of step {number} ({step.technique}) diverged {times} and went on with a lower learning "
        f"rate each time, first from {first['learning_rate']:g}. {first['what']}. Use a lower rate from the start."
    )


def _slower(artifact: ArtifactReport, uploaded: Measurement, spec: ResolvedSpec) -> Iterator[str]:
    own = artifact.measurement.latency
    taken = f"{own.median_s * 1e3:.3g} ms a sample (median, {own.threads} thread{'s' if own.threads != 1 else ''})"
    if artifact.speedup < NOISE:
        was = uploaded.latency.median_s * 1e3
        yield f"{artifact.name} is slower than the uploaded model: {taken} against {was:.3g} ms.{_compiled(artifact)}"
    elif artifact.speedup_same_runtime < NOISE:
        was = own.median_s * artifact.speedup_same_runtime * 1e3
        yield (
            f"{artifact.name} is slower than the uploaded model converted unchanged to "
            f"{artifact.measurement.runtime}: {taken} against {was:.3g} ms. What it gains, it gains by its runtime."
            f"{_compiled(artifact)}"
        )


def _compiled(artifact: ArtifactReport) -> str:
    """What torch.compile makes of a program of integers or codes, which torch by itself runs operator by operator."""
    told = artifact.details
    compiler = "torch.compile, with torch._inductor.config.freezing,"
    how = f" {compiler} is what makes it fast"
    if (reason := told.get("not_compiled")) is not None:
        return f"{how}; how fast was not measured, since {reason}."
    if not isinstance(median := told.get("compiled_median_s"), float):
        return ""
    beside, spent, rival = told.get("compiled_uploaded_s"), told.get("compiled_compile_s"), "the uploaded model"
    if not isinstance(beside, float):  # an upload that is no program of torch
        beside, rival = told.get("compiled_eager_s"), "the program as it is"
    against = f", {rival} {beside * 1e3:.3g} ms beside it" if isinstance(beside, float) else ""
    once = f" (compiled once in {spent:.0f} s)" if isinstance(spent, float) else ""
    if isinstance(beside, float) and median > beside:  # small networks, whose time is not arithmetic
        return f" Nor does {compiler} make it as fast: {median * 1e3:.3g} ms{against}{once}."
    return f"{how}: {median * 1e3:.3g} ms{against}{once}."


def _less_accurate(artifact: ArtifactReport, uploaded: Measurement, spec: ResolvedSpec) -> Iterator[str]:
    metric = artifact.measurement.metric
    if metric is None or uploaded.metric is None:
        return
    if _lost(metric, uploaded.metric) > 0:
        yield (
            f"{artifact.name} is less accurate: {metric.name.replace('_', ' ')} {_shown(metric)} against "
            f"{_shown(uploaded.metric)} on {metric.samples} samples of {metric.split}."
        )


def _worse_elsewhere(artifact: ArtifactReport, uploaded: Measurement, spec: ResolvedSpec) -> Iterator[str]:
    """What the task's own metric does not show: a class that is no longer found, confidence that means nothing."""
    metric = artifact.measurement.metric
    if metric is None or uploaded.metric is None or metric.name in UNBOUNDED:
        return
    before = {other.name: other for other in uploaded.other_metrics if other.name not in UNBOUNDED}
    for other in artifact.measurement.other_metrics:
        if other.name not in before:
            continue
        loss = _lost(other, before[other.name])
        if loss >= MARKED and _lost(metric, uploaded.metric) < loss / 2:
            yield (
                f"{artifact.name} is worse than its {metric.name.replace('_', ' ')} tells: "
                f"{other.name.replace('_', ' ')} {_shown(other)} against {_shown(before[other.name])} on "
                f"{other.samples} samples of {other.split}."
            )


def _lost(metric: Metric, before: Metric) -> float:
    """By how much it got worse."""
    return before.value - metric.value if metric.higher_is_better else metric.value - before.value


def _shown(metric: Metric) -> str:
    """A share as percent, other units as they are."""
    return f"{metric.value:.5g}" if metric.name in UNBOUNDED else f"{metric.value:.2%}"


def _not_smaller(artifact: ArtifactReport, uploaded: Measurement, spec: ResolvedSpec) -> Iterator[str]:
    if artifact.size_ratio >= SAME_SIZE:
        return
    sizes = f"{artifact.measurement.size_bytes:,} bytes against {uploaded.size_bytes:,}"
    dense = (
        artifact.format == "native"
        and not artifact.name.endswith(".zip")
        and any(isinstance(step, Prune) for step in spec.steps)
    )
    why = ": native keeps zeros in a dense file; export packed for a file that sparsity makes smaller" if dense else ""
    yield f"{artifact.name} is not smaller than the upload ({sizes}){why}."


def _nothing_held(steps: Sequence[StepReport]) -> Iterator[str]:
    if any(step.details.get("held") is False for step in steps if step.technique == "compress"):
        yield (
            "No round of compress held the uploaded model's metric on the validation split, so the weights are as they "
            "were uploaded. Allow a max_accuracy_drop, more steps, or larger codebooks."
        )


def _not_held(artifacts: Sequence[ArtifactReport], steps: Sequence[StepReport]) -> Iterator[str]:
    """A max_accuracy_drop that could not be kept to, or for which nothing became integers."""
    told = [step.details for step in steps if step.technique == "quantize"] + [one.details for one in artifacts]
    for details in told:
        if details.get("held") is False:
            wanted, floats = details["wanted_validation_metric"], details["validation_metric"]
            yield (
                f"The max_accuracy_drop was not held: {wanted:.5g} was wanted on validation, and the model has "
                f"{floats:.5g} there before it is quantized, so its layers stayed floating point. Allow a larger one, "
                "or lose less in the steps before."
            )
        elif details.get("held") and not (details.get("layers") or details.get("layers_int8")):
            yield "Nothing was quantized: no integers held the max_accuracy_drop on the validation split."


def _missed(artifacts: Sequence[ArtifactReport]) -> Iterator[str]:
    """Files that do not hold what the form of them did that was judged."""
    for artifact in artifacts:
        told = artifact.details
        if told.get("delivered_holds") is False:
            yield (
                f"{artifact.name} misses the max_accuracy_drop: {told['wanted_validation_metric']:.5g} was wanted on "
                f"validation, and the file has {told['delivered_validation_metric']:.5g} there. It rounds otherwise "
                "than what the step judged. Allow a larger drop, or take another artifact."
            )


def _few_bits_as_floats(artifacts: Sequence[ArtifactReport], steps: Sequence[StepReport]) -> Iterator[str]:
    """Weights that lie on grids and whose codes are not what is stored."""
    rows = [row for step in steps if step.details.get("method") in FEW_BITS for row in _rows(step, "layers")]
    names = {row["name"] for row in rows}
    for artifact in artifacts:
        if artifact.format == "packed":
            continue
        floats = [one.name for one in artifact.measurement.layers if one.name in names and one.bits > MOST_BITS]
        if floats and len(floats) == len(names):
            yield (
                f"{artifact.name} holds weights of few bits as floats: packed and pt2 store them in few bits, onnx and "
                "compressed-tensors those of linear layers."
            )
        elif floats:
            which = _named(floats)
            yield f"{artifact.name} holds {len(floats)} of {len(names)} weights of few bits as floats: {which}."


def _cast_as_wider(step: Cast, artifacts: Sequence[ArtifactReport], steps: Sequence[StepReport]) -> Iterator[str]:
    """Weights that a narrower type holds and whose artifact takes more bits for them."""
    casts = (report for report in steps if report.details.get("method") == step.method)
    names = {row["name"] for report in casts for row in _rows(report, "layers")}
    for artifact in artifacts:
        layers = artifact.measurement.layers
        # A file in the upload's own format may have other names, and then all are meant.
        own = [layer for layer in layers if layer.name in names] or list(layers)
        wider = [layer.name for layer in own if layer.bits > step.bits]
        written = sum(layer.bits * layer.parameters for layer in own)
        if artifact.format == "packed" and written <= step.bits * sum(layer.parameters for layer in own):
            continue  # where each tensor has a header, which is much for a small one
        if wider:
            where = "onnx and compressed-tensors store" if step.bits == MOST_BITS else "onnx, native and packed store"
            yield (
                f"{artifact.name} takes more than {step.bits} bits for {len(wider)} of the {len(own)} weights that "
                f"{step.dtype} holds ({_named(wider)}): {where} them in {step.bits}, where they can."
            )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _rows(step: StepReport, name: str) -> list[dict[str, float | int | str | None]]:
    rows = step.details.get(name)
    return rows if isinstance(rows, list) else []


def _stood_in_for(spec: ResolvedSpec, artifacts: Sequence[ArtifactReport]) -> Iterator[str]:
    """The upload's own format, where it cannot say what the network is."""
    stand_in = next((one.name for one in artifacts if one.format == STAND_IN), None)
    if stand_in and "native" in spec.export and not any(one.format == "native" for one in artifacts):
        yield (
            "A config of transformers has no words for the layers that are left (all have one width, and kinds go by "
            f"their place), so there is no native file: {stand_in} stands in, which torch loads by itself."
        )


def _not_as_asked(
    spec: ResolvedSpec, facts: ModelFacts, artifacts: Sequence[ArtifactReport], steps: Sequence[StepReport]
) -> Iterator[str]:
    step = next((step for step in spec.steps if isinstance(step, Quantize | Qat)), None)
    yield from _nothing_held(steps)
    yield from _stood_in_for(spec, artifacts)
    if any(isinstance(own, FewBits) or (isinstance(own, Qat) and not own.in_file) for own in spec.steps):
        yield from _few_bits_as_floats(artifacts, steps)
    if (cast := next((own for own in spec.steps if isinstance(own, Cast)), None)) is not None:
        yield from _cast_as_wider(cast, artifacts, steps)
    if step is None or (isinstance(step, Qat) and not step.in_file):
        return
    for artifact in artifacts:
        if artifact.format in ("native", "packed") or (artifact.format == "pt2" and step.method == "dynamic"):
            where = " and ".join(one.name for one in artifacts if one.format in INT8_EXPORTS[step.method])
            yield f"{artifact.name} is floating point; the int8 weights are in {where}."
    if step.method == "dynamic" or any(artifact.details.get("method") == "dynamic" for artifact in artifacts):
        left = sum(layer.type in CONVOLUTIONS for layer in facts.layers)
        if left:
            yield f"Dynamic quantization left {left} convolution{'s' if left != 1 else ''} in floating point."
    if any(layer.type.endswith(IN_A_BRANCH) for layer in facts.layers):
        yield "Weights in branches (If, Loop) stayed in floating point: ONNX Runtime's quantizer does not look there."
    if any(layer.type in ("LSTM", "GRU") for layer in facts.layers):
        yield "Recurrent layers stayed in floating point: ONNX Runtime has no int8 form of them."
