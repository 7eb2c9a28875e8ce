"""The uploaded model and the artifacts side by side: all reloaded, all measured in the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from app.contract.errors import ArtifactUnverified
from app.contract.packed import Sizes
from app.contract.report import ArtifactReport, Details, Latency, Measurement, PackedSizes
from app.contract.spec import Quantize
from worker.constraints import baked
from worker.context import Context
from worker.data.batch import Inputs
from worker.evaluation.artifact import CompressedFile, OnnxFile, PackedFile, Reloaded, TorchFile, fresh_folder
from worker.evaluation.compiled import measure_compiled
from worker.evaluation.judging import Judge
from worker.evaluation.measure import Bench, latencies, measure, memories
from worker.evaluation.program import ProgramFile
from worker.export.native import export_native
from worker.export.onnx import export_onnx
from worker.export.program import export_program
from worker.export.registry import Exported
from worker.model import Model
from worker.packed import load
from worker.request import RunRequest
from worker.vetting.sniff import sniff

UPLOADED = "uploaded"
# The upload turned into ONNX and nothing else: what an ONNX artifact gains beyond the change of runtime.
CONVERTED = "uploaded, converted"
# An uploaded graph as a program of torch and nothing else.
IN_TORCH = "uploaded, in torch"
CHUNK = 1 << 20


def reload(request: RunRequest, context: Context, exported: Exported) -> Reloaded:
    """An artifact in the runtime that its format is for."""
    facts = context.model.facts
    if exported.format == "pt2":
        integers, sources, coded = exported.integers, exported.sources, exported.coded
        return ProgramFile(exported.path, facts, request.threads, integers, sources, coded)
    if exported.sizes is not None:
        return _unpacked(request, context, exported.path, exported.sizes)
    if exported.bits is not None:
        spec = dict(context.model.spec or request.model_spec)
        spec.pop("config", None)  # the file has its own
        return CompressedFile(exported.path, exported.bits, spec, request.scratch, request.threads)
    if exported.reference is not None:
        single = facts.single_samples and not facts.trainable
        floats = exported.floats
        return OnnxFile(exported.path, exported.reference, facts, request.threads, floats=floats, single=single)
    return _in_own_format(request, context, context.model, exported.path, exported.path.name)


def _unpacked(request: RunRequest, context: Context, path: Path, sizes: Sizes) -> PackedFile:
    """A packed file in the upload's own format, with the weights that come out of it."""
    module = baked(context.model.module).cpu()
    state = load(path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactUnverified(f"{path.name} does not fit the model: {error}") from error
    native = export_native(module, context.model, fresh_folder(request.scratch))
    return PackedFile(path, _in_own_format(request, context, context.model, native, native.name), sizes)


def _in_own_format(
    request: RunRequest, context: Context, model: Model, path: Path, filename: str
) -> TorchFile | OnnxFile:
    """A file of a model in its own format, in the runtime that such files are for."""
    facts = model.facts
    if facts.format != "onnx":
        spec = dict(model.spec or request.model_spec)
        return TorchFile(path, filename, spec, request.scratch, request.threads)
    graph = path
    if sniff(path) != "onnx":  # an archive; the teacher is the uploaded model
        graph = model.save(baked(context.teacher).cpu(), fresh_folder(request.scratch))
    return OnnxFile(path, graph, facts, request.threads, graph=graph, single=facts.single_samples)


def compare(
    request: RunRequest, context: Context, samples: Inputs, exported: Sequence[Exported], files: Sequence[Reloaded]
) -> tuple[Measurement, tuple[ArtifactReport, ...]]:
    """The measurement of the upload and the report of each artifact; `files` are the artifacts, reloaded."""
    upload = _in_own_format(request, context, context.uploaded, request.model_path, request.model_filename)
    names = [one.path.name for one in exported]
    measured: dict[str, Reloaded] = {UPLOADED: upload, **dict(zip(names, files, strict=True))}
    rivals = dict(measured)
    if isinstance(upload, TorchFile) and any(one.reference is not None for one in exported):
        rivals[CONVERTED] = _converted(request, context, upload, exported)
    if isinstance(upload, OnnxFile) and any(one.format == "pt2" for one in exported):
        rivals[IN_TORCH] = _in_torch(request, context)
    sample = tuple(tensor[:1].contiguous() for tensor in samples)
    bench = Bench(sample, context.feed, context.model.facts.task, request.scratch, request.threads)
    taken = latencies(rivals, bench)
    memory = memories(measured, bench)
    uploaded = measure(upload, taken[UPLOADED], memory[UPLOADED], bench)
    unchanged = {
        "torch": taken.get(IN_TORCH, taken[UPLOADED]),
        "onnxruntime": taken.get(CONVERTED, taken[UPLOADED]),
    }
    reports = (
        _side_by_side(one, measure(file, taken[name], memory[name], bench), uploaded, unchanged)
        for one, file, name in zip(exported, files, names, strict=True)
    )
    return uploaded, tuple(
        _with_compiled(_with_judged(report, file, context), file, upload, bench, request.memory_bytes)
        for report, file in zip(reports, files, strict=True)
    )


def _with_judged(report: ArtifactReport, file: Reloaded, context: Context) -> ArtifactReport:
    """What a max_accuracy_drop asks is asked of the file that is delivered, where another form of it was judged."""
    wanted = context.wanted
    if wanted is None or report.format not in wanted.judged_otherwise:
        return report
    judge = Judge(context, "max_accuracy_drop")
    metric = judge(file)
    told: Details = {
        "delivered_validation_metric": judge.shown(metric),
        "wanted_validation_metric": judge.shown(wanted.metric),
        "delivered_holds": metric >= wanted.metric,
    }
    return report.model_copy(update={"details": report.details | told})


def _with_compiled(
    report: ArtifactReport, file: Reloaded, upload: Reloaded, bench: Bench, memory_bytes: int | None
) -> ArtifactReport:
    """A program of integers or codes is made to be compiled, so the report says what that gives, or why it does not."""
    if not isinstance(file, ProgramFile) or (file.integers is None and not file.coded):
        return report
    beside = upload.probe(bench.sample, bench.scratch) if upload.runtime == "torch" else None
    found = measure_compiled(file.probe(bench.sample, bench.scratch), beside, memory_bytes)
    told: Details = {"not_compiled": found} if isinstance(found, str) else {}
    if not isinstance(found, str):
        told = {f"compiled_{name}": value for name, value in asdict(found).items()}
    return report.model_copy(update={"details": report.details | told})


def _in_torch(request: RunRequest, context: Context) -> ProgramFile:
    """The uploaded graph as a float program, in the shape that it was trained in."""
    path = export_program(baked(context.teacher), context.uploaded, request.scratch / "uploaded.pt2")
    return ProgramFile(path, context.uploaded.facts, request.threads)


def _converted(request: RunRequest, context: Context, upload: TorchFile, exported: Sequence[Exported]) -> OnnxFile:
    """The upload as float ONNX. Where no step changed a weight, the int8 file was made from just that."""
    reference = next((one.reference for one in exported if one.reference is not None), None)
    unchanged = all(isinstance(step, Quantize) for step in request.spec.steps)
    if reference is None or not unchanged:
        reference = export_onnx(upload.module, context.uploaded, request.scratch / "uploaded.onnx")
    return OnnxFile(reference, reference, context.uploaded.facts, request.threads)


def _side_by_side(
    exported: Exported, measurement: Measurement, uploaded: Measurement, unchanged: Mapping[str, Latency]
) -> ArtifactReport:
    own = measurement.latency.median_s
    change = None
    if measurement.metric is not None and uploaded.metric is not None:
        change = measurement.metric.value - uploaded.metric.value
    return ArtifactReport(
        name=exported.path.name,
        format=exported.format,
        sha256=sha256(exported.path),
        measurement=measurement,
        size_ratio=uploaded.size_bytes / measurement.size_bytes,
        metric_change=change,
        speedup=uploaded.latency.median_s / own,
        speedup_same_runtime=unchanged[measurement.runtime].median_s / own,
        packed_bytes=None if exported.sizes is None else _split(exported.sizes),
        details=exported.details,
    )


def _split(sizes: Sizes) -> PackedSizes:
    return PackedSizes(
        positions=sizes.positions,
        values=sizes.values,
        codebooks=sizes.codebooks,
        biases=sizes.biases,
        header=sizes.header,
    )


def sha256(path: Path) -> str:
    """The file's SHA-256, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
