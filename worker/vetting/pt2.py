"""An exported program (`.pt2`), vetted before torch sees any of it.

`torch.export.load` runs code from a hostile file: it unpickles sample inputs, weights and constants that say so, and
evaluates symbolic sizes. So torch's reader is not used at all. What is read here is the JSON of the graph, held to a
schema, and raw bytes of tensors; sample inputs and guards are left aside, compiled code and custom objects are refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from app.contract.errors import ModelRejected
from worker.vetting.archive import Archive
from worker.vetting.operators import BLOCKS, refusal
from worker.vetting.pt2_schema import (
    DTYPES,
    ITEM_BYTES,
    MAX_NODES,
    Graph,
    Payload,
    PayloadConfig,
    Program,
    Strict,
    SymInt,
)
from worker.vetting.treespec import Call, read_call

HOW_TO_EXPORT = (
    "Export it with a batch that may vary, in eval mode:\n"
    "batch = torch.export.Dim.DYNAMIC\n"
    "program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))  # example: a batch of 2\n"
    'torch.export.save(program, "model.pt2")'
)
MAX_JSON_BYTES = 64 << 20  # a language model of 80 layers has 15 MB
SCHEMA = (8, 20)  # of torch 2.13; a later minor version may hold what this reader does not know
OPSET = 10
# Tied weights share their bytes; more than this is a small storage posing as a large tensor.
MAX_SHARING = 4
SLACK_BYTES = 1 << 20

MODEL = "models/model.json"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
_WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"
_CONSTANTS_CONFIG = f"{CONSTANTS}model_constants_config.json"
_PLAIN = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})
_TENSOR_FILE = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,6}")
# The name says "model.pt", and torch unpickles it: never opened.
_IGNORED = re.compile(r"data/sample_inputs/model\.pt")
_OBJECT_FILE = re.compile(r"data/constants/(custom_obj|opaque_obj)_.*")
_CODE = re.compile(r"data/(aotinductor|executorch)/.*|.*\.(so|o|cpp|cubin|ptx|hsaco|dll|dylib|py|pyc|pte)")

ModelT = TypeVar("ModelT", bound=Strict)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's elements lie: in `file`, with shape, strides and offset in elements of `dtype`.

    `pickled` ones were written by torch.save and are read with weights_only=True.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    is_parameter: bool
    requires_grad: bool
    pickled: bool


@dataclass(frozen=True)
class ProgramFile:
    """A vetted program. `open` gives the bytes of a tensor file."""

    program: Program
    weights: Mapping[str, StoredTensor]
    constants: Mapping[str, StoredTensor]
    call: Call
    archive: Archive

    def bytes_of(self, file: str) -> bytes:
        member = self.archive.members[file]
        return member.read(member.size, ModelRejected)


def read_program(path: Path, archive: Archive) -> ProgramFile:
    """Vets the archive of `path`. Raises ModelRejected, with what to do instead, for all but a graph and tensors."""
    _check_stored(path)
    _check_members(archive)
    program = _parse(archive, MODEL, Program)
    _check_versions(program)
    _check_operators(program.graph_module.graph)
    weights = _tensors(archive, _WEIGHTS_CONFIG, WEIGHTS)
    constants = _tensors(archive, _CONSTANTS_CONFIG, CONSTANTS)
    _check_sharing(archive, [*weights.values(), *constants.values()])
    return ProgramFile(program, weights, constants, _call(program), archive)


def _call(program: Program) -> Call:
    root = next((entry for entry in program.graph_module.module_call_graph if entry.fqn == ""), None)
    if root is None or root.signature is None:
        raise ModelRejected(f"The program does not say how it is called. {HOW_TO_EXPORT}")
    return read_call(root.signature.in_spec, root.signature.out_spec)


def _check_stored(path: Path) -> None:
    """torch.export.save compresses nothing, so a compressed entry can only be there to unpack into too much."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ModelRejected(f"{info.filename!r} is compressed, which torch.export.save never does.")


def _check_members(archive: Archive) -> None:
    if "serialized_exported_program.json" in archive.members:
        raise ModelRejected(
            "The program was saved by an older torch, in a layout that holds pickles. Export and save it again with a "
            f"current one (2.13). {HOW_TO_EXPORT}"
        )
    for name in archive.members:
        if _CODE.fullmatch(name):
            raise ModelRejected(
                f"The file holds compiled code ({name!r}), which is never run: save the program itself. {HOW_TO_EXPORT}"
            )
        if _OBJECT_FILE.fullmatch(name):
            raise ModelRejected(
                f"The file holds a pickled object ({name!r}), which would run code when read: export a model whose "
                "constants are tensors."
            )
        if name in (f"{WEIGHTS}model.pt", f"{CONSTANTS}model.pt"):
            raise ModelRejected(
                f"{name!r} is a pickle of an older torch. Save the program again with a current one (2.13)."
            )
        known = name in _PLAIN or name in (MODEL, _WEIGHTS_CONFIG, _CONSTANTS_CONFIG)
        if not (known or _TENSOR_FILE.fullmatch(name) or _IGNORED.fullmatch(name)):
            raise ModelRejected(
                f"The file holds {name[:120]!r}, which is no part of one exported program named 'model': save it with "
                "torch.export.save(program, path) alone, without extra_files."
            )
    for name in (MODEL, _WEIGHTS_CONFIG, _CONSTANTS_CONFIG):
        if name not in archive.members:
            raise ModelRejected(f"The program lacks {name!r}: the file is damaged. {HOW_TO_EXPORT}")
    _check_plain(archive)


def _check_plain(archive: Archive) -> None:
    for name, wanted in (("archive_format", b"pt2"), ("byteorder", b"little")):
        if name in archive.members and archive.members[name].read(64, ModelRejected) != wanted:
            raise ModelRejected(f"The program's {name} is not {wanted.decode()!r}: it cannot be read here.")


def _parse(archive: Archive, name: str, kind: type[ModelT]) -> ModelT:
    try:
        return kind.model_validate_json(archive.members[name].read(MAX_JSON_BYTES, ModelRejected))
    except ValidationError as failure:
        fault = failure.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        raise ModelRejected(
            f"{name!r} in the program is not what torch.export writes: "
            f"{where[:200] + ': ' if where else ''}{fault['msg'][:300].removeprefix('Value error, ')}."
        ) from None


def _check_versions(program: Program) -> None:
    version = program.schema_version
    if version.major != SCHEMA[0]:
        raise ModelRejected(
            f"The program has schema {version.major}.{version.minor}; {SCHEMA[0]}.0 to {SCHEMA[0]}.{SCHEMA[1]} are "
            "read. Save it again with torch 2.13."
        )
    if version.minor > SCHEMA[1] or program.opset_version.get("aten", OPSET) != OPSET:
        raise ModelRejected(
            f"The program comes from torch {program.torch_version[:40]!r} (schema {version.major}.{version.minor}), "
            f"which is newer than this version reads ({SCHEMA[0]}.{SCHEMA[1]}). Save it with torch 2.13."
        )


def _check_operators(graph: Graph) -> None:
    nodes = 0
    for inner in _graphs(graph):
        nodes += len(inner.nodes)
        if nodes > MAX_NODES:
            raise ModelRejected(f"The program has more than {MAX_NODES} operations.")
        for node in inner.nodes:
            if (reason := refusal(node.target)) is not None:
                raise ModelRejected(reason)
            if node.target not in BLOCKS and any(given.arg.as_graph for given in node.inputs):
                raise ModelRejected(f"{node.target!r} takes a graph as an argument, which is not taken.")


def _graphs(graph: Graph) -> Iterator[Graph]:
    """The graph and all graphs inside of it; the parser has bounded how deep they nest."""
    yield graph
    for node in graph.nodes:
        for given in node.inputs:
            if given.arg.as_graph is not None:
                yield from _graphs(given.arg.as_graph.graph)


def _tensors(archive: Archive, config: str, folder: str) -> dict[str, StoredTensor]:
    entries = _parse(archive, config, PayloadConfig).config
    return {name: _tensor(archive, name, entry, folder) for name, entry in entries.items()}


def _tensor(archive: Archive, name: str, entry: Payload, folder: str) -> StoredTensor:
    if entry.use_pickle and folder == WEIGHTS:
        raise ModelRejected(
            f"Weight {name!r} is marked as a pickle, which would run code when read: export a model whose weights are "
            "plain tensors."
        )
    file, meta = folder + entry.path_name, entry.tensor_meta
    if meta is None or not _TENSOR_FILE.fullmatch(file) or file not in archive.members:
        raise ModelRejected(f"{name!r} is not stored as a tensor of this archive ({entry.path_name[:40]!r}).")
    shape, strides, offset = _fixed(name, [*meta.sizes, *meta.strides, meta.storage_offset], len(meta.sizes))
    if len(shape) != len(strides):
        raise ModelRejected(f"Tensor {name!r} has {len(shape)} dimensions and {len(strides)} strides.")
    dtype = DTYPES[meta.dtype]
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = 0 if 0 in shape else (last + 1) * ITEM_BYTES[dtype]
    stored = archive.members[file].size
    if not entry.use_pickle and (needed > stored or stored % ITEM_BYTES[dtype]):
        raise ModelRejected(
            f"Tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {needed} bytes; {file!r} has {stored}."
        )
    return StoredTensor(name, file, dtype, shape, strides, offset, entry.is_param, meta.requires_grad, entry.use_pickle)


def _fixed(name: str, numbers: list[SymInt], dimensions: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes, strides and offset of a stored tensor, which no symbol and no negative number can be."""
    values = [number.as_int for number in numbers if number.as_int is not None and 0 <= number.as_int < 1 << 48]
    if len(values) != len(numbers):
        raise ModelRejected(f"Tensor {name!r} has a size, stride or offset that is no plain number.")
    return tuple(values[:dimensions]), tuple(values[dimensions:-1]), values[-1]


def _check_sharing(archive: Archive, tensors: list[StoredTensor]) -> None:
    total = 0
    for tensor in tensors:
        count = ITEM_BYTES[tensor.dtype]
        for size in tensor.shape:
            count *= size
        total += count
    stored = sum(member.size for member in archive.members.values())
    if total > MAX_SHARING * stored + SLACK_BYTES:
        raise ModelRejected(
            f"The weights and constants take {total} bytes and the file holds {stored}: a tensor was expanded. Call "
            ".contiguous() on it before the export."
        )
