"""An ONNX file as a Model: a trainable module where every operator has a form in torch, else the graph itself."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from onnx import ModelProto, TensorProto
from torch import nn

from app.contract.architecture import ModelSpec
from app.contract.errors import ModelRejected
from app.contract.facts import ModelFacts, Task
from worker.loading.describe import check_finite, check_forward, layer_facts
from worker.loading.feeding.plain import accepted, encoder
from worker.loading.heads import Ending, Head, find_ending
from worker.loading.onnx_check import batched, check_agreement, computed_with, sized, tolerance_of
from worker.loading.onnx_constants import count_parameters, find_weights, held_tensors, plain_weights
from worker.loading.onnx_direct import DirectModule
from worker.loading.onnx_graph import NotImportable, import_graph, inferred_shapes
from worker.loading.onnx_inputs import check_output, input_facts, vocabularies
from worker.loading.onnx_narrow import store_narrow
from worker.loading.onnx_ops.build import read_tensor
from worker.loading.onnx_weights import write_weights
from worker.model import Dtypes, Model, Save
from worker.objectives.registry import plain_task
from worker.vetting.archive import Archive, open_archive
from worker.vetting.onnx import MAX_BYTES, graphs, read_onnx
from worker.vetting.onnx_tensors import External

SUFFIX = ".onnx"
NATIVE = "native.onnx"  # beside model.onnx, which every job may deliver
_STORED: dict[int | None, torch.dtype] = {
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
}


def load_onnx(path: Path, spec: ModelSpec) -> Model:
    """A single file with its weights inside. Raises ModelRejected; nothing of the file but its graph is run."""
    if path.stat().st_size > MAX_BYTES:
        raise ModelRejected(f"The ONNX file has {path.stat().st_size} bytes; at most {MAX_BYTES} are taken.")
    return _model(read_onnx(path.read_bytes(), None, ModelRejected), spec)


def load_onnx_archive(path: Path, spec: ModelSpec, scratch: Path) -> Model:
    """An archive of one .onnx file and the data files that it names. Raises ModelRejected."""
    work = Path(tempfile.mkdtemp(prefix="onnx-", dir=scratch))
    archive = open_archive(path, work, ModelRejected)
    try:
        name = _only_graph(archive)
        folder = str(PurePosixPath(name).parent)
        prefix = "" if folder == "." else f"{folder}/"
        beside = {n.removeprefix(prefix): m for n, m in archive.members.items() if n.startswith(prefix) and n != name}
        content = archive.members[name].read(MAX_BYTES, ModelRejected)
        return _model(read_onnx(content, External(beside, work), ModelRejected), spec)
    finally:
        archive.close()


def _only_graph(archive: Archive) -> str:
    found = [name for name in archive.members if name.endswith(SUFFIX)]
    if len(found) != 1:
        raise ModelRejected(
            f"The archive holds {len(found)} .onnx files ({', '.join(map(repr, found[:4]))}); pack one model, with the "
            "data files that it names."
        )
    return found[0]


def _model(proto: ModelProto, spec: ModelSpec) -> Model:
    name = _task(spec)
    task = plain_task(name)
    _check_weights(proto)
    inputs, single = input_facts(proto)
    check_output(proto)
    output = proto.graph.output[0].name
    ending = find_ending(proto, output, inferred_shapes(proto).get(output), name)
    module = DirectModule(proto, tuple(tensor.name for tensor in inputs), ending.kind, single=single)
    known = vocabularies(proto)
    facts = ModelFacts(
        format="onnx",
        task=name,
        accepts=accepted(name, inputs),
        inputs=inputs,
        classes=1,
        labels=spec.labels,
        parameters=count_parameters(proto),
        layers=module.layers(),
        native_file=NATIVE,
        output_kind=ending.kind,
        single_samples=single,
    )
    direct = Model(
        module=module,
        facts=facts,
        encode=encoder(inputs, known),
        save=_saving_directly({}),
        saving=_saving_directly,
        task=task,
        stored=_stored_directly(proto, module),
        graph=_plain_graph,
        output_name=output,
    )
    direct = batched(sized(direct), proto)
    labels = None if spec.labels is None else len(spec.labels)
    classes = check_forward(direct.module, name, direct.example(2), direct.example(1), labels)
    direct = _with_facts(direct, classes=classes)
    try:
        return _trainable(direct, proto, ending, known)
    except NotImportable as reason:
        return _with_facts(direct, trainable=False, untrainable_reason=str(reason))


def _task(spec: ModelSpec) -> Task:
    for field in ("architecture", "config"):
        if getattr(spec, field) is not None:
            raise ModelRejected(f"An ONNX file says its layers itself: leave {field!r} out.", pointer=f"/{field}")
    if spec.task is None:
        raise ModelRejected(
            'An ONNX file does not say what it is for: give spec.task, as in {"task": "image-classification"}; '
            '"regression" takes outputs of any shape.',
            pointer="/task",
        )
    return spec.task


def _check_weights(proto: ModelProto) -> None:
    """Raises ModelRejected for weights that are not finite, and for bfloat16, which ONNX Runtime has few operators of.

    Constants that nodes compare or mask with may be infinite.
    """
    if (name := computed_with(proto, TensorProto.BFLOAT16)) is not None:
        raise ModelRejected(f"Tensor {name[:200]!r} is bfloat16: export the model in float32 or float16.")
    for weight in find_weights(proto):
        check_finite({weight.place[1][:200]: read_tensor(weight.tensor)})


def _trainable(direct: Model, proto: ModelProto, ending: Ending, known: dict[str, int]) -> Model:
    """The model as a torch module that agrees with the graph. Raises NotImportable."""
    imported = import_graph(proto, ending.logits, Head(ending.kind), fixed_batch=direct.facts.single_samples)
    module = imported.module.eval()
    check_agreement(module, direct, known, tolerance_of(proto))
    sources = {origin.path: origin.source for origin in imported.origins}
    types: dict[str | None, int] = {name: tensor.data_type for name, tensor in held_tensors(proto.graph)}

    def saving(casts: Dtypes) -> Save:
        """Writes the file's own graph, names and opset, with the module's weights."""

        def save(changed: nn.Module, folder: Path) -> Path:
            return _write(_cast(write_weights(proto, imported, changed.state_dict()), casts), folder)

        return save

    def graph(changed: nn.Module) -> ModelProto:
        """The same, the weights named as in the module's state dict."""
        written = write_weights(proto, imported, changed.state_dict())
        # The first of several weights that were made of one tensor: a recurrent layer's directions are one in the file.
        plain_weights(written.graph, {source: path for path, source in reversed(sources.items()) if source is not None})
        return written

    facts = {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "layers": layer_facts(module),
    }
    stored = {path: _STORED[types[source]] for path, source in sources.items() if types.get(source) in _STORED}
    return replace(
        _with_facts(direct, **facts), module=module, save=saving({}), saving=saving, graph=graph, stored=stored
    )


def _stored_directly(proto: ModelProto, module: DirectModule) -> dict[str, torch.dtype]:
    held = [dict(held_tensors(graph)) for graph in graphs(proto.graph)]
    types = {name: held[number][own].data_type for name, (number, own) in module.places.items()}
    return {f"{name}.weight": _STORED[kind] for name, kind in types.items() if kind in _STORED}


def _saving_directly(casts: Dtypes) -> Save:
    def save(module: nn.Module, folder: Path) -> Path:
        assert isinstance(module, DirectModule)
        return _write(_cast(module.graph(), casts), folder)

    return save


def _cast(proto: ModelProto, casts: Dtypes) -> ModelProto:
    """The graph with its floats stored in narrower types, one of which a step has asked for."""
    for dtype in set(casts.values()):
        store_narrow(proto, dtype, {})
    return proto


def _plain_graph(module: nn.Module) -> ModelProto:
    assert isinstance(module, DirectModule)
    return module.plain_graph()


def _write(proto: ModelProto, folder: Path) -> Path:
    path = folder / NATIVE
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


def _with_facts(model: Model, **changes: Any) -> Model:
    return replace(model, facts=model.facts.model_copy(update=changes))
