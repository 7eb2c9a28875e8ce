"""Hostile and damaged ONNX files: refused with a sentence, nothing read from anywhere but the upload."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.contract.errors import ModelRejected
from tests.worker.loading.files import tarred, zipped
from tests.worker.loading.onnx_files import Const, const, model, noise, one_node
from worker.inspect import inspect_upload
from worker.vetting.onnx import MAX_SUBGRAPHS, read_onnx

SPEC = {"task": "image-classification"}
X = noise(2, 4)
WEIGHT = noise(4, 3)
Change = Callable[[ModelProto], None]


def good() -> ModelProto:
    return one_node("Gemm", 20, [X, Const(WEIGHT)])


def read(proto: ModelProto) -> ModelProto:
    return read_onnx(proto.SerializeToString(), None, ModelRejected)


def refused(proto: ModelProto, words: str) -> None:
    with pytest.raises(ModelRejected, match=words) as caught:
        read(proto)
    assert len(caught.value.detail) > 30


def test_a_good_file_comes_through_as_it_was() -> None:
    proto = good()
    assert read(proto) == proto


def external(proto: ModelProto, **entries: str) -> ModelProto:
    """The weight's bytes in another file, as the entries say."""
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return proto


def holding(tensor: TensorProto) -> ModelProto:
    proto = good()
    proto.graph.initializer[0].CopyFrom(tensor)
    return proto


def node(op: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, ["x0", "x1"], ["y"], **attributes)


def of(made: NodeProto, opset: int = 20, **options: Any) -> ModelProto:
    return model([made], {"x0": X}, {"x1": WEIGHT}, opset=opset, **options)


def nested(depth: int) -> ModelProto:
    graph = helper.make_graph([helper.make_node("Identity", ["x0"], ["y"])], "inner", [], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4]))
    for level in range(depth):
        choice = numpy_helper.from_array(np.array(True), f"c{level}")
        inner = [helper.make_node("If", [f"c{level}"], ["y"], then_branch=graph, else_branch=graph, name=f"if{level}")]
        graph = helper.make_graph(inner, "outer", [], [], [choice])
        graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4]))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    made.graph.input.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 4]))
    return made


def exploding(levels: int) -> ModelProto:
    """Functions that call the next one twice: 2^levels nodes."""
    proto = of(helper.make_node("f0", ["x0"], ["y"], domain="made.up"), domains=["made.up"])
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4]))
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("made.up", 1)]
    for level in range(levels):
        deeper = f"f{level + 1}" if level + 1 < levels else "Relu"
        domain = "made.up" if level + 1 < levels else ""
        nodes = [
            helper.make_node(deeper, ["a"], ["b"], domain=domain),
            helper.make_node(deeper, ["b"], ["c"], domain=domain),
        ]
        proto.functions.append(helper.make_function("made.up", f"f{level}", ["a"], ["c"], nodes, imports))
    return proto


def looping() -> ModelProto:
    proto = exploding(2)
    proto.functions[1].node[0].op_type, proto.functions[1].node[0].domain = "f0", "made.up"
    return proto


def with_dims(*dims: int) -> TensorProto:
    return TensorProto(name="x1", data_type=TensorProto.FLOAT, dims=dims, raw_data=WEIGHT.tobytes())


def quantized() -> ModelProto:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    held = {"w": np.ones((4, 3), np.int8), "s": np.array(0.1, np.float32)}
    return model(nodes, {"x": X}, held)


def huge_value(*, output: bool = False, computed: bool = False) -> ModelProto:
    """A value of 8 GiB: in the middle, or as the output; its size given, or computed by the graph."""
    side = 1 << (10 if computed else 20)
    nodes = [helper.make_node("Mul", ["s", "s"], ["size"])] if computed else []
    nodes.append(helper.make_node("Expand", ["x", "size" if computed else "s"], ["y" if output else "big"]))
    if not output:
        nodes.append(helper.make_node("ReduceSum", ["big"], ["y"]))
    return model(nodes, {"x": [1, 1]}, {"s": np.array([side, side], np.int64)})


def sparse() -> ModelProto:
    proto = good()
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.array([3], np.int64), "i")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [12]))
    return proto


HOSTILE: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "another file without an archive": (lambda: external(good(), location="weights.bin"), "zip or tar of the .onnx"),
    "a file of the system": (lambda: external(good(), location="/etc/passwd"), "did not come with it"),
    "huge dimensions": (lambda: holding(with_dims(1 << 40, 1 << 40)), "needs .* bytes"),
    "negative dimensions": (lambda: holding(with_dims(-4, -3)), "impossible shape"),
    "many dimensions": (lambda: holding(with_dims(*[1] * 60, 12)), "impossible shape"),
    "fewer bytes than its shape": (lambda: holding(with_dims(4, 4)), "needs 64 bytes"),
    "two fields": (
        lambda: holding(TensorProto(name="x1", data_type=1, dims=[1], raw_data=b"abcd", float_data=[1.0])),
        "in one field",
    ),
    "text": (
        lambda: holding(TensorProto(name="x1", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])),
        "text",
    ),
    "a type of another time": (lambda: holding(TensorProto(name="x1", data_type=99, dims=[1])), "of type 99"),
    "float8": (
        lambda: holding(TensorProto(name="x1", data_type=TensorProto.FLOAT8E4M3FN, dims=[1], raw_data=b"a")),
        "FLOAT8E4M3FN",
    ),
    "a segment": (
        lambda: holding(TensorProto(name="x1", data_type=1, dims=[1], segment=TensorProto.Segment(begin=0, end=1))),
        "impossible shape",
    ),
    "a domain of its own": (lambda: of(node("Shell", domain="evil.corp"), domains=["evil.corp"]), "evil.corp.Shell"),
    "a kernel that opens files": (
        lambda: of(node("EPContext", domain="com.microsoft"), domains=["com.microsoft"]),
        "com.microsoft.EPContext",
    ),
    "too old": (lambda: of(node("Gemm"), opset=8), "opset 8; opsets 9 to 23"),
    "too new": (lambda: of(node("Gemm"), opset=24), "opset 24; opsets 9 to 23"),
    "quantized already": (quantized, "quantized already.*DequantizeLinear"),
    "a value beyond any memory": (huge_value, "would take"),
    "an output beyond any memory": (lambda: huge_value(output=True), "would take"),
    "a value of a size that is computed": (lambda: huge_value(computed=True), "would take"),
    "sparse": (sparse, "sparse"),
    "deep": (lambda: nested(MAX_SUBGRAPHS + 1), "more than 8 deep"),
    "exploding functions": (lambda: exploding(30), "more than 100000 nodes"),
    "endless functions": (looping, "call themselves"),
    "no graph": (lambda: ModelProto(ir_version=8), "no graph"),
}


def _without_opset() -> ModelProto:
    proto = good()
    del proto.opset_import[:]
    return proto


def _unknown() -> ModelProto:
    proto = good()
    proto.graph.node[0].op_type = "Gemmm"
    return proto


def _cycle() -> ModelProto:
    proto = good()
    proto.graph.node[0].input[0] = "y"
    return proto


def _twice() -> ModelProto:
    proto = good()
    proto.graph.node.append(proto.graph.node[0])
    return proto


HOSTILE |= {
    "no opset": (_without_opset, "one version"),
    "an operator that is none": (_unknown, "checker refuses.*Gemmm"),
    "a cycle": (_cycle, "checker refuses"),
    "two values of one name": (_twice, "checker refuses"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_a_sentence(name: str) -> None:
    make, words = HOSTILE[name]
    refused(make(), words)


def test_functions_are_written_out() -> None:
    flat = read(exploding(3))
    assert not flat.functions
    assert [node.op_type for node in flat.graph.node] == ["Relu"] * 8


def test_branches_may_nest_a_little() -> None:
    assert read(nested(3)).graph.node[0].op_type == "If"


# --- data in other files --------------------------------------------------------------------------------------------


def upload(content: bytes, folder: Path) -> Any:
    (folder / "scratch").mkdir()
    path = folder / "upload"
    path.write_bytes(content)
    return inspect_upload("model", path, "model.zip", SPEC, folder / "scratch")


def packed(pack: Callable[[dict[str, bytes]], bytes], location: str = "w.bin", **files: bytes) -> bytes:
    proto = external(good(), location=location, length=str(WEIGHT.nbytes))
    return pack({"model.onnx": proto.SerializeToString(), **{name.replace("__", "/"): f for name, f in files.items()}})


@pytest.mark.parametrize("pack", [zipped, tarred, lambda files: tarred(files, "w")])
@pytest.mark.parametrize("top", ["", "folder/"])
def test_data_beside_the_graph_is_read(pack: Callable[[dict[str, bytes]], bytes], top: str, tmp_path: Path) -> None:
    proto = external(good(), location="sub/w.bin", offset="16", length=str(WEIGHT.nbytes))
    content = pack({f"{top}model.onnx": proto.SerializeToString(), f"{top}sub/w.bin": bytes(16) + WEIGHT.tobytes()})
    facts = upload(content, tmp_path)
    assert (facts.format, facts.trainable, facts.parameters) == ("onnx", True, 12)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../w.bin", "no '..'"),
        ("a/../../w.bin", "no '..'"),
        ("/etc/passwd", "no absolute path"),
        ("C:/w.bin", "no drive"),
        ("..\\w.bin", "plain relative name"),
        ("./w.bin", "plain relative name"),
        ("", "plain relative name"),
        ("missing.bin", "not in the archive"),
        ("model.onnx", "not in the archive"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(location: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())  # what `..` would reach
    with pytest.raises(ModelRejected, match=words):
        upload(packed(zipped, location, **{"w.bin": WEIGHT.tobytes()}), tmp_path)


def linked(kind: bytes) -> bytes:
    """A tar in which the data is a link to a file of the system."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        proto = external(good(), location="w.bin", length=str(WEIGHT.nbytes)).SerializeToString()
        info = tarfile.TarInfo("model.onnx")
        info.size = len(proto)
        archive.addfile(info, io.BytesIO(proto))
        link = tarfile.TarInfo("w.bin")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def linked_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.onnx", external(good(), location="w.bin").SerializeToString())
        info = zipfile.ZipInfo("w.bin")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make", [lambda: linked(tarfile.SYMTYPE), lambda: linked(tarfile.LNKTYPE), linked_zip], ids=["sym", "hard", "zip"]
)
def test_links_are_refused(make: Callable[[], bytes], tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="a link or a device"):
        upload(make(), tmp_path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": "-8"}, "needs 48 bytes"),
        ({"offset": "8"}, "has 48 bytes"),
        ({"offset": str(1 << 62)}, "has 48 bytes"),
        ({"length": "40"}, "needs 48 bytes"),
        ({"length": "many"}, "needs 48 bytes"),
    ],
)
def test_a_stretch_that_is_not_there_is_refused(entries: dict[str, str], words: str, tmp_path: Path) -> None:
    proto = external(good(), location="w.bin", **entries)
    with pytest.raises(ModelRejected, match=words):
        upload(zipped({"model.onnx": proto.SerializeToString(), "w.bin": WEIGHT.tobytes()}), tmp_path)


def test_tensors_made_of_the_same_few_bytes_are_refused(tmp_path: Path) -> None:
    proto = external(good(), location="w.bin")
    for index in range(10):
        tensor = proto.graph.initializer.add()
        tensor.CopyFrom(proto.graph.initializer[0])
        tensor.name = f"more{index}"
    with pytest.raises(ModelRejected, match="larger than the files"):
        upload(zipped({"model.onnx": proto.SerializeToString(), "w.bin": WEIGHT.tobytes()}), tmp_path)


def test_an_archive_of_two_models_is_refused(tmp_path: Path) -> None:
    content = good().SerializeToString()
    with pytest.raises(ModelRejected, match=r"holds 2 \.onnx files"):
        upload(zipped({"a.onnx": content, "b.onnx": content}), tmp_path)


def test_nothing_is_left_where_it_was_unpacked_from(tmp_path: Path) -> None:
    upload(packed(zipped, **{"w.bin": WEIGHT.tobytes()}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "upload"]


def test_attributes_may_not_hold_what_tensors_may_not() -> None:
    proto = of(node("Gemm"))
    made = helper.make_node("Constant", [], ["c"], value=with_dims(1 << 40))
    proto.graph.node.insert(0, made)
    assert made.attribute[0].type == AttributeProto.TENSOR
    refused(proto, "needs .* bytes")


def test_external_data_in_constants_is_refused_as_well() -> None:
    made = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(WEIGHT, "c"))
    proto = of(node("Gemm"))
    tensor = made.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.node.insert(0, made)
    refused(proto, "did not come with it")


def test_a_file_that_was_cut_short_is_refused() -> None:
    content = good().SerializeToString()
    with pytest.raises(ModelRejected, match="damaged or was cut short"):
        read_onnx(content[: len(content) // 2], None, ModelRejected)


def test_constants_are_counted_as_what_onnx_says() -> None:
    proto = one_node("Add", 20, [X, const(2.0)])
    assert onnx.checker.check_model(read(proto), full_check=True) is None
