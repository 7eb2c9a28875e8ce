"""Connections of networks: what may go, and that without it a network is what it is where the way gives nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from app.contract.architecture import Architecture
from app.contract.rewiring import What
from tests.worker.helpers import tiny_model
from tests.worker.loading.onnx_files import run as run_onnx
from tests.worker.loading.programs import exported, image, load
from tests.worker.structure.nets import Excited, network
from tests.worker.structure.support import model_of
from worker.constraints import baked
from worker.data.batch import Inputs
from worker.export.onnx import export_onnx
from worker.loading import load_model
from worker.loading.layers import build
from worker.loading.onnx import load_onnx
from worker.model import Model
from worker.structure.connections.joins import Connection, Connections, connections, neutral, standing
from worker.structure.connections.rewording import told_without, was_called
from worker.structure.edits import apply
from worker.structure.graphs import Graph, graph_of
from worker.techniques.structure.rewire import batches_of, edits_of


@cache
def opened(name: str) -> tuple[nn.Module, Model, Graph]:
    """A network as code, and as a graph; nobody changes them."""
    module, inputs, _ = network(name)
    model = model_of(module, inputs)
    return module, model, graph_of(model)


def found_in(graph: Graph, model: Model, what: What = "branches") -> Connections:
    batches = batches_of(model)
    return standing(graph, batches, connections(graph, batches[0], what))


def without(graph: Graph, *gone: Connection) -> nn.Module:
    """A copy that has lost them."""
    module = baked(graph.module)
    apply(module, edits_of(graph, gone))
    return module


@contextmanager
def giving(layer: nn.Module, value: float) -> Iterator[None]:
    """Meanwhile what a layer gives is so everywhere."""
    hook = layer.register_forward_hook(lambda _, given, made: torch.full_like(made, value))
    try:
        yield
    finally:
        hook.remove()


def run(module: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(*inputs)
    return output


BRANCHES: dict[str, Callable[[int], str]] = {
    "bert": lambda i: f"inner.bert.encoder.layer.{i // 2}.{('attention.output.dense', 'output.dense')[i % 2]}",
    "llama": lambda i: f"inner.model.layers.{i // 2}.{('self_attn.o_proj', 'mlp.down_proj')[i % 2]}",
    "vit": lambda i: f"inner.vit.layers.{i // 2}.{('attention.o_proj', 'mlp.fc2')[i % 2]}",
    "gpt2": lambda i: f"inner.transformer.h.{i // 2}.{('attn.c_proj', 'mlp.c_proj')[i % 2]}",
}


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_each_sublayer_of_a_transformer_may_go_alone(name: str) -> None:
    module, model, graph = opened(name)
    found = found_in(graph, model)
    assert [one.name for one in found.found] == [BRANCHES[name](i) for i in range(4)]
    assert not found.kept
    _holds(module, model, graph, found.found)


@pytest.mark.parametrize(("name", "count"), [("resnet", 5), ("mobilenet_v2", 10)])
def test_branches_of_convolutions_may_go_where_both_ways_have_one_shape(name: str, count: int) -> None:
    module, model, graph = opened(name)
    found = found_in(graph, model).found
    assert len(found) == count
    _holds(module, model, graph, found)


def _holds(module: nn.Module, model: Model, graph: Graph, found: list[Connection]) -> None:
    """Without a way the network computes what its code does where the way's last layer gives zeros; and has no weight
    of that way."""
    weights = module.state_dict()
    for one in found:
        left = without(graph, one)
        for inputs in batches_of(model):
            with giving(module.get_submodule(one.name), 0.0):
                expected = run(module, inputs)
            torch.testing.assert_close(run(left, inputs), expected, rtol=1e-5, atol=1e-5)
        kept = dict(left.named_parameters())
        assert all(torch.equal(own, weights[key]) for key, own in kept.items())
        own = {key for key, _ in graph.module.named_parameters()} - set(kept)
        assert own
        assert {key.rpartition(".")[0] for key in own} == set(one.layers)
        assert not any(path.startswith(one.name) for path, _ in left.named_modules())


def test_all_that_may_go_may_go_together() -> None:
    _, model, graph = opened("llama")
    found = found_in(graph, model).found
    left = without(graph, *found)
    inputs = batches_of(model)[1]
    expected = neutral(graph.module, found, inputs)
    torch.testing.assert_close(run(left, inputs), expected)
    assert {name.rpartition(".")[2] for name, own in left.named_modules() if list(own.parameters(recurse=False))} == {
        "embed_tokens", "norm", "lm_head",
    }  # fmt: skip


def test_a_program_of_code_can_be_trained() -> None:
    _, model, graph = opened("bert")
    left = without(graph, found_in(graph, model).found[0])
    before = {name: own.clone() for name, own in left.named_parameters()}
    optimizer = torch.optim.SGD(left.parameters(), 0.1)
    left.train()(*batches_of(model)[0]).square().mean().backward()
    optimizer.step()
    changed = [name for name, own in left.named_parameters() if not torch.equal(own, before[name])]
    assert len(changed) == len([own for own in left.parameters() if own.requires_grad and own.grad is not None]) > 10


def test_a_skip_leaves_the_branch() -> None:
    """Of the block of ResNet whose shortcut has no weights."""
    module, model, graph = opened("resnet")
    (skip,) = found_in(graph, model, "skips").found
    left, inputs = without(graph, skip), batches_of(model)[1]
    block: Any = module.get_submodule("inner.resnet.encoder.stages.1.layers.1")

    def plain(x: Tensor) -> Tensor:
        return block.activation(block.layer(x))

    own = block.forward
    block.forward = plain
    try:
        expected = run(module, inputs)
    finally:
        block.forward = own
    torch.testing.assert_close(run(left, inputs), expected)
    assert dict(left.named_parameters()).keys() == dict(graph.module.named_parameters()).keys()


def test_a_gate_that_goes_is_one_that_is_open() -> None:
    module, model, graph = opened("excited")
    (gate,) = found_in(graph, model, "gates").found
    assert gate.layers == ("down", "up")
    left, inputs = without(graph, gate), batches_of(model)[1]
    with giving(module.get_submodule("up"), 1e3):  # of which the sigmoid is one
        expected = run(module, inputs)
    torch.testing.assert_close(run(left, inputs), expected)
    assert not found_in(graph, model).found


def test_all_gates_of_an_efficientnet() -> None:
    module, model, graph = opened("efficientnet")
    found = connections(graph, batches_of(model)[0], "gates").found
    assert len(found) == 7
    left, inputs = without(graph, *found), batches_of(model)[0]
    hooks = [
        module.get_submodule(one.name).register_forward_hook(lambda _, given, made: torch.full_like(made, 1e3))
        for one in found
    ]
    expected = run(module, inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(run(left, inputs), expected)


class Odd(nn.Module):
    """Sums of which nothing may go, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.read, self.narrow, self.out = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) + self.place(x) + self.shift  # no activation from which both come
        read = self.read(x)
        x = (x + read) * read.sigmoid()  # what is added is read elsewhere too
        return self.out(self.narrow(x) + x).mean(1)


def test_what_may_not_go_says_why() -> None:
    torch.manual_seed(0)
    module = Odd().eval()
    model = model_of(module, (torch.randint(9, (2, 4)),))
    graph = graph_of(model)
    found = found_in(graph, model)
    assert [one.name for one in found.found] == ["narrow"]  # but not what it is added to
    assert list(found.kept.values()) == ["what read gives is read elsewhere too"]
    assert not found_in(graph, model, "gates").found


class InPlace(nn.Module):
    """What a sum gives is written into: without the sum that would be what is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.way, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.out(self.way(x).add_(x).relu_() + x)


def test_what_writes_in_place_is_tried() -> None:
    torch.manual_seed(0)
    module = InPlace().eval()
    model = model_of(module, (torch.randn(2, 4),))
    graph = graph_of(model)
    found = found_in(graph, model)
    assert list(found.kept) == ["way/0"]
    assert "computes something else" in found.kept["way/0"]
    (whole,) = found.found  # all that is added to x
    (x,) = batches_of(model)[1]
    torch.testing.assert_close(run(without(graph, whole), (x,)), run(module.out, (x,)))


LINEAR = {"type": "Linear", "in_features": 6, "out_features": 6}
TANH = {"type": "Tanh"}
LAYERS: list[dict[str, Any]] = [
    LINEAR,
    {"type": "Residual", "layers": [LINEAR, TANH]},
    {"type": "Sequential", "layers": [{"type": "Residual", "layers": [LINEAR], "shortcut": [LINEAR, TANH]}]},
    {"type": "Parallel", "join": "add", "branches": [[LINEAR], [], [LINEAR, {"type": "Residual", "layers": [LINEAR]}]]},
    {"type": "Parallel", "join": "concat", "branches": [[LINEAR], [LINEAR]]},
    {"type": "Linear", "in_features": 12, "out_features": 3},
]  # fmt: skip
WAYS = [
    ("1", "layers"), ("2.0", "layers"), ("2.0", "shortcut"), ("3.branches.2.1", "layers"), ("3", 0), ("3", 2),
]  # fmt: skip


def described() -> tuple[Architecture, nn.Sequential, Model]:
    torch.manual_seed(0)
    words = Architecture.model_validate({"layers": LAYERS})
    module = build(words.layers).eval()
    return words, module, tiny_model(module, shape=(6,), classes=3)


def test_an_architecture_has_the_ways_of_its_words() -> None:
    _, _, model = described()
    graph = graph_of(model)
    assert graph.ways is not None
    for what, expected in (
        ("branches", WAYS),
        ("skips", [("1", "shortcut"), ("3.branches.2.1", "shortcut"), ("3", 1)]),
    ):
        found = found_in(graph, model, what).found  # type: ignore[arg-type]
        assert sorted(map(str, (graph.ways[one.cut] for one in found))) == sorted(map(str, expected))


@pytest.mark.parametrize("what", ["branches", "skips"])
def test_an_architecture_without_a_way_is_told_in_words(what: What) -> None:
    words, module, model = described()
    graph = graph_of(model)
    found = found_in(graph, model, what).found
    chosen = [[one] for one in found]
    together: list[Connection] = []
    for one in found:
        if not any(one.join in own.gone for own in together):
            together.append(one)
    for gone in [*chosen, together]:
        left, layers = copy.deepcopy(module), words.layers
        names: dict[str, str] = {}
        edits = edits_of(graph, gone)
        for edit in edits:
            layers = told_without(layers, edit["join"], edit["side"])
        apply(left, edits)
        inputs = batches_of(model)[1]
        torch.testing.assert_close(run(left, inputs), neutral(graph.module, gone, inputs))
        again = build(layers).eval()
        again.load_state_dict(left.state_dict())
        assert torch.equal(run(again, inputs), run(left, inputs))
        for name in left.state_dict():
            names[name] = name
            for edit in reversed(edits):
                names[name] = was_called(names[name], edit["join"], edit["side"])
            assert torch.equal(left.state_dict()[name], module.state_dict()[names[name]])


def test_a_program_keeps_its_file_and_loses_weights(tmp_path: Path) -> None:
    from tests.worker.loading.programs import ConvNet

    net = ConvNet().eval()
    model = load(exported(net, image()), tmp_path / "up")
    graph = graph_of(model)
    assert graph.module is model.module
    (one,) = found_in(graph, model).found
    assert one.layers == ("block.0", "block.1")
    left = without(graph, one)
    path = model.save(left, tmp_path)
    assert path.stat().st_size < (tmp_path / "up" / "upload.pt2").stat().st_size
    program = torch.export.load(path)
    assert not any(name.startswith("block") for name in program.state_dict)
    with giving(net.block, 0.0), torch.no_grad():
        expected = net(image(5))
        torch.testing.assert_close(program.module()(image(5)), expected, rtol=1e-5, atol=1e-5)


def test_an_onnx_graph_loses_branches_and_gates(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.way, self.act = Excited(), nn.Linear(5, 5), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x + self.way(self.act(x))

    net = Net().eval()
    code = model_of(net, (torch.randn(2, 3, 8, 8),))
    path = export_onnx(copy.deepcopy(net), code, tmp_path / "m.onnx")
    model = load_model(path, path.name, {"task": "image-classification"}, tmp_path)
    assert isinstance(model.module, fx.GraphModule)
    graph = graph_of(model)
    (branch,), (gate,) = (found_in(graph, model, what).found for what in ("branches", "gates"))
    left = without(graph, branch, gate)
    written = export_onnx(left, replace(model, module=left, graph=None), tmp_path / "left.onnx")
    assert load_onnx(written, model_spec()).facts.parameters == sum(own.numel() for own in left.parameters())
    x = torch.randn(3, 3, 8, 8)
    with giving(net.way, 0.0), giving(net.inner.up, 1e3):
        expected = run(net, (x,))
    given = run_onnx(onnx.load(written), {"input_0": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-4, atol=1e-5)


def model_spec() -> Any:
    from app.contract.architecture import ModelSpec

    return ModelSpec(task="image-classification")


def test_layers_that_compute_twice_are_told_apart() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + F.gelu(self.way(x))
            return self.out(x)

    model = model_of(Twice().eval(), (torch.randn(2, 4),))
    graph = graph_of(model)
    found = found_in(graph, model).found
    assert [one.name for one in found] == ["way/0", "way/1"]
    one, both = (without(graph, *found[:count]) for count in (1, 2))
    assert "way.weight" in dict(one.named_parameters())
    assert "way.weight" not in dict(both.named_parameters())
