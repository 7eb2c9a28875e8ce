"""The outline of a protobuf message, checked against messages that protobuf itself wrote, and against made-up bytes."""

from __future__ import annotations

import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper

from app.contract.errors import ModelRejected
from tests.worker.loading.onnx_files import const, noise, one_node
from worker.vetting import protobuf
from worker.vetting.protobuf import check_message

GOOD = one_node("Gemm", 20, [noise(2, 4), const(noise(4, 5))]).SerializeToString()


def check(data: bytes) -> None:
    check_message(data, ModelProto.DESCRIPTOR, ModelRejected)


def nested(depth: int) -> bytes:
    """A model whose graph's node has an attribute with a graph, and so on."""
    graph = GraphProto(name="innermost")
    for _ in range(depth):
        node = NodeProto(op_type="If", attribute=[helper.make_attribute("then_branch", graph)])
        graph = GraphProto(node=[node])
    return ModelProto(graph=graph).SerializeToString()


def test_what_protobuf_writes_passes() -> None:
    check(GOOD)
    check(b"")
    check(nested(10))


@pytest.mark.parametrize("cut", [1, 7, len(GOOD) // 2, len(GOOD) - 1])
def test_a_message_that_was_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ModelRejected, match="damaged or was cut short"):
        check(GOOD[:cut])


MADE_UP = {
    "a length beyond the end": b"\x3a\x7f\x00",
    "a length inside beyond its message": b"\x3a\x02\x0a\x7f",
    "a number that does not end": b"\x08" + b"\xff" * 20,
    "a group": b"\x3b\x3c",
    "a kind that is none": b"\x0f",
}


@pytest.mark.parametrize("name", MADE_UP)
def test_what_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(ModelRejected, match="damaged"):
        check(MADE_UP[name])


@pytest.mark.parametrize("part", ["producer_name", "op_type"])
def test_a_name_that_is_not_utf8_is_refused(part: str) -> None:
    named = ModelProto(producer_name="producer_name", graph=GraphProto(node=[NodeProto(op_type="op_type")]))
    content = named.SerializeToString()
    check(content)
    with pytest.raises(ModelRejected, match="not UTF-8"):
        check(content.replace(part.encode(), b"\xff" * len(part)))


def test_messages_nest_so_deep_and_no_deeper() -> None:
    with pytest.raises(ModelRejected, match="more than 64 deep"):
        check(nested(30))


def test_what_is_small_in_the_file_and_large_in_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 1000)
    empty_nodes = b"\x0a\x00" * 2000
    graph = b"\x3a" + bytes([0x80 | len(empty_nodes) & 0x7F, len(empty_nodes) >> 7]) + empty_nodes
    with pytest.raises(ModelRejected, match="more than 1000 things"):
        check(graph)
