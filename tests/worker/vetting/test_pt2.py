"""Hostile and damaged programs: a refusal with a sentence, and nothing that they hold is ever executed."""

from __future__ import annotations

import functools
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.errors import ModelRejected
from tests.worker.loading.files import Bomb, torch_saved
from tests.worker.loading.programs import (
    CONSTANTS,
    MODEL,
    SAMPLES,
    WEIGHTS,
    ConvNet,
    edited,
    exported,
    image,
    load,
    objects,
    outputs,
    packed,
    unpacked,
)

Json = dict[str, Any]


@functools.cache
def good() -> bytes:
    return exported(ConvNet().eval(), image())


def graph(tree: Json) -> Json:
    found: Json = tree["graph_module"]["graph"]
    return found


def with_model(change: Callable[[Json], Any]) -> bytes:
    return edited(good(), MODEL, change)


def with_file(**files: bytes | None) -> bytes:
    """With files added, replaced or, where None, left out."""
    parts = unpacked(good()) | files
    return packed({name: content for name, content in parts.items() if content is not None})


# --- the four ways in which torch.export.load was shown to run code ------------------------------------------------


def in_sample_inputs(canary: Path) -> bytes:
    return with_file(**{SAMPLES: torch_saved(Bomb(canary))})


def in_a_weight(canary: Path) -> bytes:
    def mark(tree: Json) -> None:
        tree["config"]["stem.bias"]["use_pickle"] = True

    files = unpacked(edited(good(), WEIGHTS, mark))
    name = json.loads(files[WEIGHTS])["config"]["stem.bias"]["path_name"]
    return packed(files | {f"data/weights/{name}": torch_saved(Bomb(canary))})


def in_an_opaque_constant(canary: Path) -> bytes:
    def add(tree: Json) -> None:
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        tree["config"]["anything"] = entry

    files = unpacked(edited(good(), CONSTANTS, add))
    return packed(files | {"data/constants/opaque_obj_0": pickle.dumps(Bomb(canary))})


def in_an_expression(canary: Path) -> bytes:
    return with_expression(f"__import__('pathlib').Path({str(canary)!r}).touch()")


def with_expression(text: str) -> bytes:
    def change(tree: Json) -> None:
        for found in objects(tree):
            if "expr_str" in found:
                found["expr_str"] = text

    return with_model(change)


ATTACKS: dict[str, tuple[Callable[[Path], bytes], str | None]] = {
    "sample inputs": (in_sample_inputs, None),
    "weight": (in_a_weight, "marked as a pickle"),
    "opaque constant": (in_an_opaque_constant, "pickled object"),
    "expression": (in_an_expression, "symbolic size that calls '__import__'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_executed(tmp_path: Path, name: str) -> None:
    make, words = ATTACKS[name]
    canary = tmp_path / "executed"
    content = make(canary)
    if words is None:  # nobody reads the sample inputs, so the program itself is sound
        assert torch.equal(outputs(load(content, tmp_path / "in").module, image()), outputs(ConvNet().eval(), image()))
    else:
        with pytest.raises(ModelRejected, match=words):
            load(content, tmp_path / "in")
    assert not canary.exists()


PLAIN_LOAD = """
import sys, torch
for path in sys.argv[1:]:
    try:
        torch.export.load(path)
    except Exception:
        pass
"""


def test_plain_torch_would_have_executed_each(tmp_path: Path) -> None:
    paths = []
    for name, (make, _) in ATTACKS.items():
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(make(tmp_path / f"{name} executed"))
        paths.append(str(path))
    subprocess.run([sys.executable, "-c", PLAIN_LOAD, *paths], check=True, capture_output=True, timeout=300)
    assert sorted(path.name for path in tmp_path.glob("*executed")) == sorted(f"{name} executed" for name in ATTACKS)


# --- the other ways in ---------------------------------------------------------------------------------------------


def with_target(target: str) -> bytes:
    def change(tree: Json) -> None:
        graph(tree)["nodes"][0]["target"] = target

    return with_model(change)


def with_specs(out: Any = None, into: Any = None) -> bytes:
    def change(tree: Json) -> None:
        signature = tree["graph_module"]["module_call_graph"][0]["signature"]
        if out is not None:
            signature["out_spec"] = out if isinstance(out, str) else json.dumps([1, out])
        if into is not None:
            signature["in_spec"] = json.dumps([1, into])

    return with_model(change)


def with_argument(value: Json) -> bytes:
    """The first node's first argument replaced."""

    def change(tree: Json) -> None:
        graph(tree)["nodes"][0]["inputs"][0]["arg"] = value

    return with_model(change)


def with_meta(**fields: Any) -> bytes:
    """One stored weight, of shape [8, 1, 3, 3], described otherwise."""

    def change(tree: Json) -> None:
        tree["config"]["stem.weight"]["tensor_meta"] |= fields

    return edited(good(), WEIGHTS, change)


def ints(*numbers: int) -> list[Json]:
    return [{"as_int": number} for number in numbers]


def with_payload(**fields: Any) -> bytes:
    def change(tree: Json) -> None:
        tree["config"]["stem.weight"] |= fields

    return edited(good(), WEIGHTS, change)


def renamed_value(old: str, new: str) -> bytes:
    files = unpacked(good())
    files[MODEL] = files[MODEL].replace(f'"name": "{old}"'.encode(), f'"name": {json.dumps(new)}'.encode())
    return packed(files)


def renamed_weight(new: str) -> bytes:
    files = unpacked(good())
    for name in (MODEL, WEIGHTS):
        files[name] = files[name].replace(b'"stem.weight"', json.dumps(new).encode())
    return packed(files)


def pickled_constant(canary: Path) -> bytes:
    def mark(tree: Json) -> None:
        tree["config"]["scale"]["use_pickle"] = True

    files = unpacked(edited(good(), CONSTANTS, mark))
    name = json.loads(files[CONSTANTS])["config"]["scale"]["path_name"]
    return packed(files | {f"data/constants/{name}": torch_saved(Bomb(canary))})


def nested_graphs(depth: int) -> bytes:
    """Blocks in blocks."""
    empty: Json = {
        "inputs": [],
        "outputs": [],
        "nodes": [],
        "tensor_values": {},
        "sym_int_values": {},
        "sym_bool_values": {},
    }
    inner = empty
    for _ in range(depth):
        node = {
            "target": "torch.ops.higher_order.wrap_with_set_grad_enabled",
            "inputs": [
                {"name": "", "arg": {"as_bool": False}, "kind": 1},
                {"name": "", "arg": {"as_graph": {"name": "g", "graph": inner}}, "kind": 1},
            ],
            "outputs": [],
            "metadata": {},
        }
        inner = empty | {"nodes": [node]}

    def change(tree: Json) -> None:
        graph(tree)["nodes"] = inner["nodes"] + graph(tree)["nodes"]

    return with_model(change)


def duplicate_member() -> bytes:
    buffer = io.BytesIO(good())
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    return buffer.getvalue()


def traversal() -> bytes:
    buffer = io.BytesIO(good())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/../../evil", b"x")
    return buffer.getvalue()


def with_spec_kind(kind: str) -> bytes:
    def change(tree: Json) -> None:
        tree["graph_module"]["signature"]["input_specs"][-1] = {kind: {}}

    return with_model(change)


def version(**fields: int) -> bytes:
    return with_model(lambda tree: tree["schema_version"].update(fields))


LEAF: Json = {"type": None, "context": None, "children_spec": []}
MARKED = "data/aotinductor/model/wrapper"

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "compiled library": (lambda: with_file(**{f"{MARKED}.so": b"\x7fELF"}), r"compiled code .*wrapper\.so"),
    "source of a kernel": (lambda: with_file(**{f"{MARKED}.cpp": b"int main(){}"}), "compiled code"),
    "compiled model alone": (lambda: packed({f"{MARKED}.so": b"\x7fELF"}), "compiled code"),
    "python source": (lambda: with_file(**{"extra/x.py": b"import os"}), "compiled code"),
    "extra files": (lambda: with_file(**{"extra/labels.txt": b"a"}), "without extra_files"),
    "second model": (lambda: with_file(**{"models/other.json": b"{}"}), "no part of one exported program"),
    "torchbind object": (lambda: with_file(**{"data/constants/custom_obj_0": b"x"}), "pickled object"),
    "weights pickled by an older torch": (lambda: with_file(**{"data/weights/model.pt": b"x"}), "older torch"),
    "layout of torch 2.7 and before": (
        lambda: packed({"serialized_exported_program.json": b"{}"}),
        "saved by an older torch",
    ),
    "path traversal": (traversal, r"\.\."),
    "duplicate member": (duplicate_member, "twice"),
    "compressed": (lambda: packed(unpacked(good()), zipfile.ZIP_DEFLATED), "compressed"),
    "big endian": (lambda: with_file(byteorder=b"big"), "byteorder"),
    "no program": (lambda: with_file(**{MODEL: None, "models/x.json": b"{}"}), "no part of one"),
    "no weights": (lambda: with_file(**{WEIGHTS: None}), "lacks"),
    "no JSON": (lambda: with_file(**{MODEL: b"{oops"}), r"model\.json.*JSON"),
    "deep JSON": (lambda: with_file(**{MODEL: b"[" * 200_000}), "recursion"),
    "unknown field": (lambda: with_model(lambda tree: tree | {"hook": "os.system"}), "hook.*not permitted"),
    "deep inner graphs": (lambda: nested_graphs(60), "recursion"),
    "newer schema": (lambda: version(minor=99), "newer than this version reads"),
    "other schema": (lambda: version(major=9), "schema 9"),
    "newer opset": (lambda: with_model(lambda tree: tree["opset_version"].update(aten=99)), "newer"),
    "power tower": (lambda: with_expression("9**9**9**9"), "power beyond 8"),
    "power tower of functions": (lambda: with_expression("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), "power"),
    "deep expression": (lambda: with_expression("(" * 200 + "s0" + ")" * 200), "nested more than 64"),
    "long expression": (lambda: with_expression("s0+" * 5000 + "s0"), "characters"),
    "attribute in an expression": (lambda: with_expression("s0.__class__.__mro__"), "no arithmetic"),
    "lambda in an expression": (lambda: with_expression("(lambda: 1)()"), "no arithmetic|names 'lambda'"),
    "derived size": (lambda: with_expression("2*s0"), "depends on another"),
    "operator of a custom library": (lambda: with_target("torch.ops.evil.run.default"), r"torch\.ops\.evil\.run"),
    "operator that reads files": (lambda: with_target("torch.ops.aten.from_file.default"), "from_file"),
    "control flow": (lambda: with_target("torch.ops.higher_order.cond"), "control flow"),
    "python function": (lambda: with_target("os.system"), "'os.system'"),
    "builtin": (lambda: with_target("builtins.eval"), "'builtins.eval'"),
    "torch function": (lambda: with_target("torch.hub.load"), "'torch.hub.load'"),
    "extension": (lambda: with_target("#evil:run"), "'#evil:run'"),
    "attribute getter": (lambda: with_target("_operator.attrgetter"), "attrgetter"),
    "method caller": (lambda: with_target("_operator.methodcaller"), "methodcaller"),
    "dunder": (lambda: with_target("torch.ops.aten.__class__.default"), "not among those"),
    "unknown overload": (lambda: with_target("torch.ops.aten.conv2d.evil"), "no operator aten.conv2d.evil"),
    "overload that writes": (lambda: with_target("torch.ops.aten.add.out"), "not among those"),
    "overload of TorchScript": (lambda: with_target("torch.ops.aten.add.str"), "not among those"),
    "random numbers": (lambda: with_target("torch.ops.aten.rand.default"), r"model\.eval\(\)"),
    "treespec of a function": (
        lambda: with_specs(out={"type": "posix.system", "context": '["logits"]', "children_spec": [LEAF]}),
        "'posix.system'",
    ),
    "treespec of a class": (
        lambda: with_specs(out={"type": "subprocess.Popen", "context": '["x"]', "children_spec": [LEAF]}),
        "'subprocess.Popen'",
    ),
    "treespec that is none": (lambda: with_specs(out="import os"), "cannot be read"),
    "deep treespec": (lambda: with_specs(out="[1," + "[" * 30_000), "cannot be read"),
    "long treespec": (lambda: with_specs(out="[1, " + " " * 70_000 + "{}]"), "cannot be read"),
    "nested arguments": (
        lambda: with_specs(into={"type": "builtins.list", "context": "null", "children_spec": [LEAF]}),
        "nested",
    ),
    "operator as an argument": (lambda: with_argument({"as_operator": "os.system"}), "as_operator.*not permitted"),
    "custom object as an argument": (
        lambda: with_argument({"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}),
        "as_custom_obj",
    ),
    "two kinds in one argument": (lambda: with_argument({"as_int": 1, "as_bool": True}), "was expected"),
    "words as an argument": (lambda: with_argument({"as_string": "'); import os; ('"}), "as_string"),
    "huge number": (lambda: with_argument({"as_int": 1 << 70}), "as_int"),
    "unknown value": (lambda: with_argument({"as_tensor": {"name": "nowhere"}}), "before anything gives it"),
    "value with code for a name": (lambda: renamed_value("x", "x=__import__('os').system('true')"), "name"),
    "value with a line break": (lambda: renamed_value("x", "x\n"), "name"),
    "weight with code for a name": (lambda: renamed_weight('a"); import os; ("'), "stem|config|parameter_name"),
    "keyword for a name": (lambda: renamed_value("x", "class"), "no input|cannot be read"),
    "custom object as input": (lambda: with_spec_kind("custom_obj"), "custom_obj"),
    "token as input": (lambda: with_spec_kind("token"), "token"),
    "weights elsewhere": (lambda: with_payload(path_name="../../../etc/passwd"), "not stored as a tensor"),
    "weights of another kind": (lambda: with_payload(path_name="model.pt"), "not stored as a tensor"),
    "weights beyond their file": (lambda: with_meta(storage_offset={"as_int": 1 << 40}), "takes .* bytes"),
    "strides beyond their file": (
        lambda: with_meta(strides=ints(1 << 40, 9, 3, 1)),
        "takes .* bytes",
    ),
    "negative stride": (
        lambda: with_meta(strides=ints(-9, 9, 3, 1)),
        "no plain number",
    ),
    "small storage as a large tensor": (
        lambda: with_meta(sizes=ints(1 << 20, 1 << 20, 9, 9), strides=ints(0, 0, 0, 0)),
        "was expanded",
    ),
    "symbolic weight": (lambda: with_meta(sizes=[{"as_expr": {"expr_str": "s0"}}] * 4), "no plain number"),
    "sparse weight": (lambda: with_meta(layout=1), "layout 1 is not taken"),
    "complex weight": (lambda: with_meta(dtype=10), "dtype 10 is not taken"),
    "rank that differs": (lambda: with_meta(strides=ints(1)), "dimensions and 1 strides"),
    "another shape": (
        lambda: with_meta(sizes=ints(8, 3, 3, 1), strides=ints(9, 3, 1, 1)),
        "fails at its operation stem",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_programs_are_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    make, words = HOSTILE[kind]
    with pytest.raises(ModelRejected, match=words) as caught:
        load(make(), tmp_path / "in")
    detail = caught.value.detail
    assert len(detail) > 30
    assert len(detail) < 1500
    assert str(tmp_path) not in detail
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["upload.pt2"]


def test_a_pickled_constant_is_read_as_data_or_not_at_all(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    with pytest.raises(ModelRejected, match=r"'scale' is a pickle of more than a tensor"):
        load(pickled_constant(canary), tmp_path / "in")
    assert not canary.exists()
    files = unpacked(pickled_constant(canary))
    name = json.loads(files[CONSTANTS])["config"]["scale"]["path_name"]
    fine = packed(files | {f"data/constants/{name}": torch_saved(torch.full((10,), 0.5))})
    assert torch.equal(outputs(load(fine, tmp_path / "in").module, image()), outputs(ConvNet().eval(), image()))
    wrong = packed(files | {f"data/constants/{name}": torch_saved(torch.full((11,), 0.5))})
    with pytest.raises(ModelRejected, match="not the plain tensor"):
        load(wrong, tmp_path / "in")


def test_what_nobody_reads_is_dropped(tmp_path: Path) -> None:
    """Guards, metadata, names of verifiers and the treespecs of inner modules."""

    def change(tree: Json) -> None:
        tree["guards_code"] = ["__import__('os').system('false')"]
        tree["verifiers"] = ["os.system"]
        tree["graph_module"]["metadata"]["custom"] = "__import__('os')"
        for node in graph(tree)["nodes"]:
            node["metadata"]["nn_module_stack"] = "a,__import__('os').system('false'),b"
        spec = json.dumps([1, {"type": "os.system", "context": "null", "children_spec": []}])
        inner = {"inputs": [], "outputs": [], "in_spec": spec, "out_spec": spec, "forward_arg_names": None}
        tree["graph_module"]["module_call_graph"][1]["signature"] = inner

    loaded = load(with_model(change), tmp_path)
    assert torch.equal(outputs(loaded.module, image()), outputs(ConvNet().eval(), image()))
    assert "import" not in loaded.module.code


class Sizes(nn.Module):
    """Computes with sizes, so that its graph has arithmetic to spoil."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([x, torch.zeros(x.shape[0] * 2, 4)])
        return padded[: x.shape[0]] + 1.0


def test_a_few_numbers_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    program = exported(Sizes().eval(), torch.randn(3, 4))
    assert torch.equal(outputs(load(program, tmp_path).module, torch.ones(2, 4)), torch.full((2, 4), 2.0))

    def large(tree: Json) -> None:
        for node in graph(tree)["nodes"]:
            if node["target"] == "torch.ops.aten.zeros.default":
                node["inputs"][0]["arg"]["as_sym_ints"][1] = {"as_int": 1 << 40}

    with pytest.raises(ModelRejected, match=r"takes .* bytes"):
        load(edited(program, MODEL, large), tmp_path)

    def tower(tree: Json) -> None:
        nodes = graph(tree)["nodes"]
        at = next(i for i, node in enumerate(nodes) if node["target"] == "_operator.mul")
        name = nodes[at]["outputs"][0]["as_sym_int"]["as_name"]
        for step in range(40):  # each the square of the one before
            square = json.loads(json.dumps(nodes[at]))
            value = {"as_sym_int": {"as_name": name}}
            square["inputs"] = [{"name": key, "arg": value, "kind": 1} for key in "ab"]
            name = f"square_{step}"
            square |= {"name": name, "outputs": [{"as_sym_int": {"as_name": name}}]}
            nodes.insert(at + 1 + step, square)
        for node in nodes[at + 41 :]:
            if node["target"] == "torch.ops.aten.zeros.default":
                node["inputs"][0]["arg"]["as_sym_ints"][0] = {"as_name": name}

    with pytest.raises(ModelRejected, match="a size beyond 64 bits"):
        load(edited(program, MODEL, tower), tmp_path)

    def power(tree: Json) -> None:
        node = next(node for node in graph(tree)["nodes"] if node["target"] == "_operator.mul")
        node["target"] = "_operator.pow"
        node["inputs"][1]["arg"] = {"as_int": 1 << 40}

    with pytest.raises(ModelRejected, match="a power of"):
        load(edited(program, MODEL, power), tmp_path)
