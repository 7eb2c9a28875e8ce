"""Real ONNX files with their structure spoiled, hundreds of times: they load, or they are refused with a sentence.

Weights are most of a file and any weight is a good one, so bytes are changed beside them, and whole graphs in their
parts: operators, names, attributes, shapes, opsets.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, defs, numpy_helper
from torch import Tensor, nn

from app.contract.errors import ModelRejected
from tests.worker.loading.test_onnx_real import real
from worker.loading import load_model

BYTES, GRAPHS = 200, 100  # changed files of each kind; the seeds are fixed, so that a failure is one for everybody
# Where a size is asked for: nothing, the usual, too much, and what wraps around.
NUMBERS = (0, 1, -1, 2, 3, 7, -2, 64, 255, 1 << 31, -(1 << 31), 1 << 62, -(1 << 63))
FLOATS = (0.0, -1.0, 1e38, float("inf"), float("nan"))
OPERATORS = sorted(schema.name for schema in defs.get_all_schemas() if schema.domain == "")
BIG = 64  # bytes of a tensor that is taken for a weight


def check(content: bytes, folder: Path) -> None:
    path = folder / "upload"
    path.write_bytes(content)
    detail = None
    try:
        load_model(path, "model.onnx", {"task": "text-classification"}, folder)
    except ModelRejected as refused:
        detail = refused.detail
    assert detail is None or (len(detail) > 20 and str(folder) not in detail)


# --- bytes --------------------------------------------------------------------------------------------------------


def beside_the_weights(content: bytes) -> list[int]:
    """The places of a file that are no numbers of a weight."""
    proto = ModelProto.FromString(content)
    held = [*proto.graph.initializer, *(a.t for node in proto.graph.node for a in node.attribute if a.HasField("t"))]
    spans = sorted(
        (content.find(tensor.raw_data), len(tensor.raw_data)) for tensor in held if len(tensor.raw_data) > BIG
    )
    places, position = [], 0
    for start, length in spans:
        places += range(position, start)
        position = start + length
    return [*places, *range(position, len(content))]


def spoiled(content: bytes, places: list[int], rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = min(rng.choice(places), len(data) - 1)
        match rng.choice(("flip", "set", "cut", "insert")):
            case "flip":
                data[place] ^= 1 << rng.randrange(8)
            case "set":
                data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case "cut":
                del data[place : place + rng.randint(1, 8)]
            case "insert":
                data[place:place] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


def test_a_real_file_with_bytes_changed(tmp_path: Path) -> None:
    content = real("magika", "models", "standard_v3_3", "model.onnx").read_bytes()
    places = beside_the_weights(content)
    assert len(places) < len(content) / 50
    for seed in range(BYTES):
        check(spoiled(content, places, random.Random(seed)), tmp_path)


# --- graphs -------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Embedding, recurrence, convolution, norm: operators of many kinds, and shapes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrent = nn.GRU(8, 8, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        steps = self.recurrent(self.embedding(ids))[0].transpose(1, 2)
        pooled = nn.functional.max_pool1d(torch.relu(self.norm(self.conv(steps))), 2)
        flat = pooled.reshape(ids.shape[0], 8, -1).mean(-1)
        return torch.softmax(self.fc(flat), -1)


@pytest.fixture(scope="module")
def network() -> ModelProto:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    axes = {"ids": {0: "batch", 1: "steps"}}
    names = {"input_names": ["ids"], "output_names": ["y"]}
    ids = torch.ones(2, 16, dtype=torch.int64)
    torch.onnx.export(Network().eval(), (ids,), buffer, dynamo=False, opset_version=14, dynamic_axes=axes, **names)
    return onnx.load_from_string(buffer.getvalue())


def an_operator(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    node.op_type = rng.choice(OPERATORS)


def a_name(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    names = ["", *(name for other in proto.graph.node for name in other.output)]
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)


def an_attribute(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    if not node.attribute:
        return
    attribute = rng.choice(node.attribute)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(FLOATS)
    else:
        node.attribute.remove(attribute)


def a_number(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    """One element of a constant: a size, an axis, a weight."""
    held = [other.attribute[0].t for other in proto.graph.node if other.op_type == "Constant"]
    tensor = rng.choice([*held, *proto.graph.initializer])
    values = numpy_helper.to_array(tensor).copy()
    if values.size:
        choices = NUMBERS if tensor.data_type == TensorProto.INT64 else FLOATS
        values.reshape(-1)[rng.randrange(values.size)] = np.asarray(rng.choice(choices)).astype(values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def a_shape(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    tensor = rng.choice(proto.graph.initializer)
    dims = list(tensor.dims)
    rng.shuffle(dims)
    tensor.ClearField("dims")
    tensor.dims.extend(dims if rng.random() < 0.5 else [int(np.prod(dims))])


def an_input(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    size = rng.choice(proto.graph.input[0].type.tensor_type.shape.dim)
    size.dim_value = rng.choice((0, 1, 2, 3, 1000, 1 << 40, -1))


def an_opset(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    proto.opset_import[0].version = rng.randint(8, 24)


def a_node(proto: ModelProto, node: NodeProto, rng: random.Random) -> None:
    proto.graph.node.remove(node)


CHANGES: tuple[Callable[[ModelProto, NodeProto, random.Random], None], ...] = (
    *(an_operator, a_name, an_attribute, an_attribute, a_number, a_number),
    *(a_shape, an_input, an_opset, a_node),
)


@pytest.mark.filterwarnings("ignore")  # of torch's older exporter, and of numbers that are none
def test_a_graph_with_its_parts_changed(network: ModelProto, tmp_path: Path) -> None:
    for seed in range(GRAPHS):
        rng = random.Random(seed)
        proto = ModelProto()
        proto.CopyFrom(network)
        for _ in range(rng.randint(1, 2)):
            rng.choice(CHANGES)(proto, rng.choice(proto.graph.node), rng)
        check(proto.SerializeToString(), tmp_path)
