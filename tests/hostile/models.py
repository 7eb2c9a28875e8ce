"""Families of models: pickles in every costume, programs, safetensors, ONNX, Hugging Face folders, specs."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from safetensors.torch import save
from torch import Tensor, nn

from tests.hostile.member import IMAGES, READY, Make, Member, made, model, touching, weights
from tests.worker.loading import test_garbage as garbage
from tests.worker.loading.files import (
    Bomb,
    bert,
    folder_files,
    linear_spec,
    tokenizer_config,
    torch_saved,
    zipped,
)
from tests.worker.loading.onnx_files import model as onnx_model
from tests.worker.loading.programs import MODEL, edited, exported
from tests.worker.vetting import test_onnx as onnx_files
from tests.worker.vetting import test_pt2 as programs

Files = dict[str, bytes]
LINEAR = {"type": "Linear", "in_features": 4, "out_features": 2}


def pickles() -> Iterator[Member]:
    """A pickle bare, in today's and yesterday's torch.save, in a zip, in a Hugging Face folder, under a false name."""
    costumes: dict[str, tuple[Make, str, dict[str, Any]]] = {
        "bare": (lambda canary: pickle.dumps(Bomb(canary)), "bare pickle", {}),
        "protocol 0": (lambda canary: pickle.dumps(Bomb(canary), 0), "pickle|no file of a known kind", {}),
        "torch.save": (lambda canary: torch_saved({"0.weight": Bomb(canary)}), "pickled objects", linear_spec()),
        "old torch.save": (
            lambda canary: torch_saved({"0.weight": Bomb(canary)}, _use_new_zipfile_serialization=False),
            "pickled objects",
            linear_spec(),
        ),
        "whole module": (lambda canary: torch_saved([nn.Linear(4, 2), Bomb(canary)]), "pickled objects", linear_spec()),
        "pytorch_model.bin": (
            lambda canary: zipped({"config.json": b"{}", "pytorch_model.bin": torch_saved(Bomb(canary))}),
            "safe_serialization",
            {},
        ),
        "TorchScript": (
            lambda canary: zipped(
                {"m/data.pkl": pickle.dumps(Bomb(canary)), "m/code/x.py": b"", "m/constants.pkl": b""}
            ),
            "TorchScript",
            {},
        ),
        "Keras": (
            lambda canary: zipped({"config.json": pickle.dumps(Bomb(canary)), "model.weights.h5": b"x"}),
            "Keras",
            {},
        ),
    }
    for name, (make, says, spec) in costumes.items():
        yield from touching(name, make, says, filename="model.safetensors", spec=spec)


def attacks_of_programs() -> Iterator[Member]:
    """The four ways in which torch.export.load was shown to run code, and a fifth that reads a pickled constant."""
    for name, (make, says) in programs.ATTACKS.items():
        yield from touching(name, make, says, filename="model.pt2", spec=IMAGES)
    says = "is a pickle of more than a tensor"
    yield from touching("constant", programs.pickled_constant, says, filename="model.pt2", spec=IMAGES)


def spoiled_programs() -> Iterator[Member]:
    """Compiled code, operators that are none, expressions, treespecs, weights that lie: the reader's own tests."""
    for name, (content, says) in programs.HOSTILE.items():
        yield Member(name, made(content), says, filename="model.pt2", spec=IMAGES)


def headers() -> Iterator[Member]:
    """Safetensors whose header is long, deep, doubled, of too many tensors, or lies about what follows."""
    wanted = [name for name, (_, says) in garbage.KINDS.items() if name.startswith("header") or "safetensors" in says]
    wanted += ["duplicate name", "overlap", "outside", "negative", "shape x dtype", "huge shape", "odd shape"]
    wanted += ["odd dtype", "odd metadata", "unprintable name"]
    for name in dict.fromkeys(wanted):
        make, says = garbage.KINDS[name]
        yield weights(name, functools.partial(_in_a_folder, make), says)
    yield weights("header of 100 MB", lambda: _header(b"{" + b" " * (100 << 20)), "at most 8388608")
    yield weights("300,000 tensors", lambda: many_tensors(300_000), "claims|holds 300000 tensors")
    yield weights("100,001 short tensors", lambda: many_tensors(100_001), "holds 100001 tensors")
    yield weights("long names", lambda: _header(json.dumps({"n" * (4 << 20): {}}).encode()), "unusable name")


def _in_a_folder(make: Callable[[Path], bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder))


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def many_tensors(count: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return _header(("{" + ",".join(f'"{number}":{entry}' for number in range(count)) + "}").encode())


def twice_named() -> bytes:
    return _in_a_folder(garbage.KINDS["duplicate name"][0])


def foreign() -> Iterator[Member]:
    """Files of other programs and of none under a model's name."""
    names = ("nothing", "one byte", "random", "HDF5", "GGUF", "TensorFlow", "TensorFlow Lite", "web page", "git-lfs")
    for name in (*names, "gzip", "7z", "picture", "arrays", "Keras", "compressed torch.save", "cut torch.save"):
        make, says = garbage.KINDS[name]
        yield weights(name, functools.partial(_in_a_folder, make), says)


def onnx_graphs() -> Iterator[Member]:
    """ONNX graphs with shapes, operators, branches and functions that ask for too much: the reader's own tests."""
    for name, (proto, says) in onnx_files.HOSTILE.items():
        told = "no file of a known kind" if name == "no graph" else says  # it does not look like ONNX either
        yield _onnx(name, functools.partial(_serialized, proto), told)


def _serialized(proto: Callable[[], Any]) -> bytes:
    content: bytes = proto().SerializeToString()
    return content


def external_data() -> Iterator[Member]:
    """ONNX whose weights lie elsewhere: `..`, absolute paths, links of both kinds, stretches that are not there."""
    places = {
        "..": ("../w.bin", r"no '\.\.'"),
        ".. in the middle": ("a/../../w.bin", r"no '\.\.'"),
        "absolute": ("/etc/passwd", "no absolute path"),
        "process": ("/proc/self/environ", "no absolute path"),
        "drive": ("C:/w.bin", "no drive"),
        "missing": ("missing.bin", "not in the archive"),
        "itself": ("model.onnx", "not in the archive"),
    }
    for name, (location, says) in places.items():
        content = functools.partial(onnx_files.packed, zipped, location, **{"w.bin": onnx_files.WEIGHT.tobytes()})
        yield _onnx(name, content, says)
    yield _onnx("symlink", lambda: onnx_files.linked(tarfile.SYMTYPE), "a link or a device")
    yield _onnx("hard link", lambda: onnx_files.linked(tarfile.LNKTYPE), "a link or a device")
    yield _onnx("link in a zip", onnx_files.linked_zip, "a link or a device")
    for name, entries in {"before the file": {"offset": "-8"}, "far behind it": {"offset": str(1 << 62)}}.items():
        yield _onnx(name, functools.partial(_stretch, entries), "needs 48 bytes|has 48 bytes")


def _onnx(name: str, content: Callable[[], bytes], says: str | None) -> Member:
    return Member(name, made(content), says, filename="model.onnx", spec=IMAGES)


def _stretch(entries: dict[str, str]) -> bytes:
    proto = onnx_files.external(onnx_files.good(), location="w.bin", **entries)
    return zipped({"model.onnx": proto.SerializeToString(), "w.bin": onnx_files.WEIGHT.tobytes()})


def folders() -> Iterator[Member]:
    """Hugging Face folders with code: `auto_map` in every file that may hold it, modules, templates, paths."""
    mapped = b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    spoiled: dict[str, tuple[dict[str, bytes], str | None]] = {
        "auto_map of the model": ({"config.json": _config(auto_map={"AutoModel": "evil.Model"})}, "auto_map"),
        "auto_map of another repository": (
            {"config.json": _config(auto_map={"AutoModel": "someone/evil--evil.Model"})},
            "auto_map",
        ),
        "auto_map of the tokenizer": ({"tokenizer_config.json": mapped}, "auto_map"),
        "auto_map of the processor": ({"preprocessor_config.json": mapped}, "auto_map"),
        "module": ({"modeling_evil.py": b"import os; os.system('touch executed')"}, "code"),
        "template": ({"tokenizer_config.json": tokenizer_config(chat_template="{{ 1/0 }}")}, READY),
        "path of the tokenizer": ({"tokenizer_config.json": tokenizer_config(tokenizer_file="/etc/passwd")}, READY),
        "index that leads out": (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../../../etc/passwd"}}'},
            "not in the folder",
        ),
        "a billion layers": ({"config.json": _config(num_hidden_layers=10**9)}, "num_hidden_layers"),
        "huge layers": ({"config.json": _config(hidden_size=1 << 20, intermediate_size=1 << 24)}, "belong|do not fit"),
        "deep config": ({"config.json": b"[" * 100_000}, "no JSON"),
        "deep config of the tokenizer": ({"tokenizer_config.json": b'{"a":' * 50_000}, "JSON"),
        "deep tokenizer": ({"tokenizer.json": b'{"a":' * 50_000}, "tokenizer"),
        "unknown type": ({"config.json": _config(model_type="evil")}, "model_type 'evil'"),
        "activation by name": ({"config.json": _config(hidden_act="os.system")}, "cannot build the model"),
    }
    for name, (changes, says) in spoiled.items():
        yield model(name, functools.partial(_folder, changes), says, "model.zip")


def _folder(changes: Files) -> bytes:
    return zipped(_bert() | changes)


@functools.cache
def _bert() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        bert(Path(folder))
        return folder_files(Path(folder))


def _config(**changes: Any) -> bytes:
    return json.dumps(json.loads(_bert()["config.json"]) | changes).encode()


def large_demands() -> Iterator[Member]:
    """A few hundred bytes that describe a computation of gigabytes."""
    layers = {
        "a layer of 4 GiB": [{"type": "Conv2d", "in_channels": 1, "out_channels": 16384, "kernel_size": 1}],
        "a layer of 16 GiB of zeros": [{"type": "AdaptiveAvgPool2d", "output_size": 65536}],
    }
    for name, found in layers.items():
        spec = linear_spec(input={"shape": [1, 256, 256]}, architecture={"layers": found})
        yield Member(name, lambda canary: _in_a_folder(garbage.good), "at most|takes .* bytes", spec=spec)
    pooling = [{"type": "AdaptiveAvgPool2d", "output_size": 2}, {"type": "Flatten"}]
    for shape, says in (([1, 8192, 4096], READY), ([1, 8192, 8192], "elements"), ([65536, 65536], "elements")):
        spec = linear_spec(input={"shape": shape}, architecture={"layers": [*pooling, LINEAR]})
        yield Member(f"an input of {shape}", lambda canary, shape=shape: _third_layer(shape), says, spec=spec)
    for side, says in ((1 << 12, READY), (1 << 14, "would take"), (1 << 20, "would take")):
        yield _onnx(f"an ONNX value of {side} x {side}", functools.partial(_expanding, side), says)
    for side, says in ((1 << 10, READY), (1 << 13, "memory"), (1 << 15, "memory")):
        content = functools.partial(_expanding_unseen, side)
        yield _onnx(f"an ONNX value of {side} x {side}, by a power", content, says)
    for size, says in ((1 << 20, READY), (1 << 28, "takes .* bytes"), (1 << 60, "takes .* bytes|fails at")):
        content = functools.partial(_padded, size)
        yield Member(f"a program's {size} zeros", made(content), says, filename="model.pt2", spec=IMAGES)


def _third_layer(shape: list[int]) -> bytes:
    """Other bytes for every shape: those of a model that is ready stay, whoever else sends them."""
    return save({"2.weight": torch.full((2, 4), float(shape[0] + shape[-1])), "2.bias": torch.ones(2)})


def _expanding(side: int) -> bytes:
    nodes = [
        helper.make_node("Expand", ["x", "s"], ["big"]),
        helper.make_node("Mul", ["big", "big"], ["square"]),
        helper.make_node("ReduceSum", ["square"], ["y"]),
    ]
    content: bytes = onnx_model(nodes, {"x": [1, 1]}, {"s": np.array([side, side], np.int64)}).SerializeToString()
    return content


def _expanding_unseen(side: int) -> bytes:
    """The size comes out of floating-point numbers, where shape inference does not follow."""
    nodes = [
        helper.make_node("Pow", ["root", "two"], ["side"]),
        helper.make_node("Cast", ["side"], ["s"], to=TensorProto.INT64),
        helper.make_node("Expand", ["x", "s"], ["big"]),
        helper.make_node("Mul", ["big", "big"], ["square"]),
        helper.make_node("Exp", ["square"], ["grown"]),
        helper.make_node("Sum", ["big", "square", "grown"], ["all"]),
        helper.make_node("ReduceSum", ["all"], ["y"]),
    ]
    root = np.array([side**0.5, side**0.5], np.float32)
    weights = {"root": root, "two": np.array(2, np.float32)}
    content: bytes = onnx_model(nodes, {"x": [1, 1]}, weights).SerializeToString()
    return content


class _Zeros(nn.Module):
    """Adds zeros whose number a file may say."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape[0], 4).sum()


def _padded(size: int) -> bytes:
    def change(tree: dict[str, Any]) -> None:
        for node in tree["graph_module"]["graph"]["nodes"]:
            if node["target"] == "torch.ops.aten.zeros.default":
                node["inputs"][0]["arg"]["as_sym_ints"][1] = {"as_int": size}

    return edited(_zeros(), MODEL, change)


@functools.cache
def _zeros() -> bytes:
    return exported(_Zeros().eval(), torch.ones(3, 4))


FAMILIES: dict[str, Callable[[], Iterator[Member]]] = {
    "pickles": pickles,
    "attacks of programs": attacks_of_programs,
    "spoiled programs": spoiled_programs,
    "safetensors headers": headers,
    "foreign files": foreign,
    "ONNX graphs": onnx_graphs,
    "ONNX external data": external_data,
    "Hugging Face folders": folders,
    "large demands": large_demands,
}
