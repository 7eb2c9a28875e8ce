"""The artifact formats by name: who writes each, and how it is served."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import nn

from app.contract.errors import ExportFailed
from app.contract.estimate import static_passes
from app.contract.facts import calibration_split
from app.contract.packed import Sizes
from app.contract.spec import RANKED_ON, ExportFormat, Quantize
from worker.context import Context, Wanted
from worker.data.batch import Batch, Inputs
from worker.evaluation.artifact import OnnxFile
from worker.evaluation.judging import Judge
from worker.export.native import export_native
from worker.export.onnx import export_onnx, takes_single_samples
from worker.export.packed import export_packed
from worker.export.program import FILENAME, export_program, save_program
from worker.loading.onnx_narrow import store_float8, store_narrow
from worker.techniques.base import Details
from worker.techniques.pruning.weights import prunable
from worker.techniques.quantization.calibration import CALIBRATION_BATCH, Samples
from worker.techniques.quantization.coded_layers import Coded, with_codes
from worker.techniques.quantization.either import quantize_either
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.leaving import Limit
from worker.techniques.quantization.onnx_bits import store_bits
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.program_int8 import Source, integer_module
from worker.techniques.quantization.quantize import excluded
from worker.techniques.quantization.static.learned import Learned, LearnedWeight

BINARY = "application/octet-stream"
ZIP = "application/zip"


@dataclass(frozen=True)
class Exported:
    """A written artifact. `reference` is the float ONNX file with the same weights, where the artifact is ONNX, and
    `floats` the one whose weights its integers stand for; `sizes` says what the bytes are for, where it is packed;
    `bits` which weights are codes, of how many bits, where it is a folder of compressed-tensors; `integers` the int8
    graph that a program was made of, and `sources` which of its weights each of the program's integers is; `coded` the
    weights of few bits in a program; `details` how it was made, where data decided that."""

    path: Path
    format: ExportFormat
    media_type: str
    reference: Path | None
    sizes: Sizes | None = None
    bits: Mapping[str, int] | None = None
    floats: Path | None = None
    integers: Int8Graph | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    coded: Mapping[str, Coded] = field(default_factory=dict)
    details: Details = field(default_factory=dict)


Exporter = Callable[[nn.Module, Context, Path], Exported]
Found = TypeVar("Found")


def write_native(module: nn.Module, context: Context, folder: Path) -> Exported:
    """The upload's own format; floating point even after a quantize step, which lives in the ONNX file."""
    path = export_native(module, context.model, folder)
    return Exported(path, "native", ZIP if path.suffix == ".zip" else BINARY, None)


def write_onnx(module: nn.Module, context: Context, folder: Path) -> Exported:
    """ONNX: floating point, or int8 or fewer bits where a quantize step asked for it."""
    path = folder / "model.onnx"
    if context.quantization is not None:
        made = _int8_graph(module, context, context.quantization)
        shutil.copyfile(made.path, path)
        return Exported(path, "onnx", BINARY, made.reference, floats=made.floats, details=made.details)
    if not context.grids:
        export_onnx(module, context.model, path)
        _narrow(module, context, path)
        return Exported(path, "onnx", BINARY, path)
    reference = export_onnx(module, context.model, context.scratch / "float.onnx")
    exact = {
        name: tensor.cpu().numpy() for name, tensor in module.state_dict().items() if tensor.dtype == torch.float32
    }
    store_bits(reference, path, _of_all_names(module, context.grids), exact)
    return Exported(path, "onnx", BINARY, reference)


def write_program(module: nn.Module, context: Context, folder: Path) -> Exported:
    """A program of torch: int8 where a quantize step of method static asked for it, or with weights of few bits; else
    floating point."""
    path = folder / FILENAME
    step = context.quantization
    if step is None or step.method != "static":
        coded: dict[str, Coded] = {}
        if step is None and context.grids:
            module, coded = with_codes(module.cpu(), context.grids, context.model.stored)
        return Exported(export_program(module, context.model, path), "pt2", BINARY, None, coded=coded)
    made = _int8_graph(module, context, step)
    found = integer_module(onnx.load(made.path), fixed_batch=takes_single_samples(made.reference))
    save_program(found.module, context.model, path)
    return Exported(
        path, "pt2", BINARY, None, floats=made.floats, integers=made, sources=found.sources, details=made.details
    )


def _int8_graph(module: nn.Module, context: Context, step: Quantize) -> Int8Graph:
    """The int8 ONNX file of the quantize step, made once for all artifacts."""
    if context.int8 is None:
        path, reference = context.scratch / "int8.onnx", context.scratch / "float.onnx"
        export_onnx(module, context.model, reference)
        float_layers = [layer.name for layer in context.model.facts.layers if excluded(layer.name, step)]
        batch = 1 if takes_single_samples(reference) else CALIBRATION_BATCH
        samples, limit = _samples(context, step, batch), _limit(context, step, reference, batch)
        if samples is not None and step.or_dynamic:
            context.int8 = quantize_either(reference, path, step, samples, float_layers, limit)
        else:
            own = _learned(module, context)
            context.int8 = quantize_file(reference, path, step, samples, float_layers, limit, own)
    return context.int8


def _learned(module: nn.Module, context: Context) -> Learned:
    """What quantization-aware training has left, as the int8 file takes it."""
    weights = {
        weight.name: LearnedWeight(
            weight.by_output(weight.value()).flatten(1).cpu().numpy(), context.grids[weight.name].step[:, 0].numpy()
        )
        for weight in prunable(module)
        if weight.name in context.grids
    }
    return Learned(_of_all_names(module, weights), _of_all_names(module, context.ranges))


def _narrow(module: nn.Module, context: Context, path: Path) -> None:
    """Stores the file's floats as narrow as a step asked for; what it computes stays the same."""
    casts, scales = context.model.casts, _of_all_names(module, context.scales)
    if not casts and not scales:
        return
    proto, state = onnx.load(path), module.state_dict()
    for dtype in set(casts.values()):
        store_narrow(proto, dtype, state)
    store_float8(proto, scales, state, context.model.stored)
    onnx.save_model(proto, str(path))


def _of_all_names(module: nn.Module, found: Mapping[str, Found]) -> dict[str, Found]:
    """What was found of weights by every name that they have: an exported graph has a shared one under the last."""
    places = {module.get_parameter(name).data_ptr(): own for name, own in found.items()}
    state = module.state_dict().items()
    return {name: places[tensor.data_ptr()] for name, tensor in state if tensor.data_ptr() in places}


def write_packed(module: nn.Module, context: Context, folder: Path) -> Exported:
    """The weights alone, entropy-coded; floating point even after a quantize step that lives in the ONNX file."""
    _refuse_without_words(context, "packed")
    path = folder / "model.tsr"
    sizes = export_packed(module.cpu(), context.model, path)
    return Exported(path, "packed", BINARY, None, sizes)


def write_compressed(module: nn.Module, context: Context, folder: Path) -> Exported:
    """A folder of transformers, zipped, with codes in the place of weights that lie on grids."""
    # Only here, since transformers takes seconds to import.
    from worker.export.compressed_tensors import export_compressed

    _refuse_without_words(context, "compressed-tensors")
    path = folder / "model.compressed-tensors.zip"
    bits = export_compressed(module.cpu(), context.model, context.grids, context.scales, path)
    return Exported(path, "compressed-tensors", ZIP, None, bits=bits)


def _refuse_without_words(context: Context, what: str) -> None:
    """Of a student that is a folder nobody knew when the job was submitted. Raises ExportFailed."""
    if context.model.native_as is not None:
        raise ExportFailed(
            f"{what} holds weights for a config, which has no words for this network.", pointer="/export"
        )


def _samples(context: Context, step: Quantize, batch: int = CALIBRATION_BATCH) -> Samples | None:
    if step.method == "dynamic":
        return None
    feed = context.feed
    assert feed is not None  # compatibility.check asked for calibration data
    split = calibration_split(feed.data.facts)
    assert split is not None
    samples = min(step.calibration.samples, feed.size(split))
    count = -(-samples // batch)
    seen, expected = itertools.count(), count * static_passes(step)

    def batches() -> Iterator[Batch]:
        # Data lies sorted by class more often than not: the first samples would all be of one.
        order = torch.Generator().manual_seed(context.seed)
        for own in feed.batches(split, batch, shuffle=order, limit=samples):
            context.progress(min(1.0, next(seen) / expected))
            yield own

    names = [tensor.name for tensor in context.model.facts.inputs]
    return Samples(batches, names, count)


def _limit(context: Context, step: Quantize, reference: Path, batch: int) -> Limit | None:
    """What the step's max_accuracy_drop asks of the file, which is judged as the runtime runs it."""
    if step.max_accuracy_drop is None:
        return None
    feed, facts = context.feed, context.model.facts
    assert feed is not None  # compatibility.check asked for a validation split
    split = calibration_split(feed.data.facts)
    assert split is not None

    def samples() -> Iterator[Inputs]:
        order = torch.Generator().manual_seed(context.seed)
        return (one.inputs for one in feed.batches(split, batch, shuffle=order, limit=RANKED_ON))

    def opened(file: Path) -> OnnxFile:
        single = facts.single_samples and not facts.trainable
        return OnnxFile(file, reference, facts, torch.get_num_threads(), single=single)

    judge = Judge(context, "max_accuracy_drop")
    wanted = judge.wanted(step.max_accuracy_drop)
    context.wanted = Wanted(wanted, ("pt2",))  # the file that is judged is ONNX, and a program rounds less
    return Limit(wanted, judge, judge.shown, opened, samples)


EXPORTERS: dict[ExportFormat, Exporter] = {
    "native": write_native,
    "onnx": write_onnx,
    "packed": write_packed,
    "compressed-tensors": write_compressed,
    "pt2": write_program,
}
