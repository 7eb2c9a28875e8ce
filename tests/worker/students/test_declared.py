"""Narrower and shallower copies say what the network says wherever what they leave out says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.architecture import Architecture
from worker.loading.layers import build
from worker.students.declared import Copy, narrower, shallower

SILENT = (1, 2)  # of four features everywhere


def conv(ins: int, outs: int, **more: Any) -> dict[str, Any]:
    return {"type": "Conv2d", "in_channels": ins, "out_channels": outs, "kernel_size": 3, "padding": 1} | more


def dense(ins: int, outs: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": ins, "out_features": outs}


RELU, NORM = {"type": "ReLU"}, {"type": "BatchNorm2d", "num_features": 4}
POOL = [{"type": "AdaptiveAvgPool2d", "output_size": 1}, {"type": "Flatten"}]
BLOCK = {"type": "Residual", "layers": [conv(4, 4), NORM, RELU, conv(4, 4)]}
LSTM = {"type": "LSTM", "input_size": 4, "hidden_size": 4, "num_layers": 2, "bidirectional": True}
EMBEDDING = {"type": "Embedding", "num_embeddings": 9, "embedding_dim": 4}
CONV1D = {"type": "Conv1d", "in_channels": 2, "out_channels": 4, "kernel_size": 2}
ENCODER = {"type": "TransformerEncoderLayer", "d_model": 4, "nhead": 2, "dim_feedforward": 4}

MAPS, IDS, SOUND = torch.randn(3, 2, 6, 6), torch.randint(9, (3, 5)), torch.randn(3, 2, 7)
# Layers and an example; all that make features make four.
NETWORKS: dict[str, tuple[list[dict[str, Any]], Tensor]] = {
    "convolutions": ([conv(2, 4), NORM, RELU, conv(4, 4), RELU, *POOL, dense(4, 3)], MAPS),
    "flattened maps": (
        [
            conv(2, 4),
            RELU,
            {"type": "MaxPool2d", "kernel_size": 2},
            {"type": "Flatten"},
            dense(36, 4),
            RELU,
            dense(4, 3),
        ],
        MAPS,
    ),
    "residual": ([conv(2, 4), BLOCK, RELU, BLOCK, *POOL, dense(4, 3)], MAPS),
    "shortcut": (
        [conv(2, 4), {"type": "Residual", "layers": [conv(4, 4), RELU], "shortcut": [conv(4, 4)]}, *POOL, dense(4, 3)],
        MAPS,
    ),
    "concatenated": (
        [{"type": "Parallel", "branches": [[conv(2, 4), RELU], [conv(2, 4)]]}, conv(8, 4), *POOL, dense(4, 3)],
        MAPS,
    ),
    "added": (
        [{"type": "Parallel", "branches": [[conv(2, 4)], [conv(2, 4), NORM]], "join": "add"}, *POOL, dense(4, 3)],
        MAPS,
    ),
    "depthwise": ([conv(2, 4), conv(4, 4, groups=4), NORM, RELU, conv(4, 4), *POOL, dense(4, 3)], MAPS),
    "transposed": (
        [{"type": "ConvTranspose2d", "in_channels": 2, "out_channels": 4, "kernel_size": 2}, *POOL, dense(4, 3)],
        MAPS,
    ),
    "recurrent": ([EMBEDDING, LSTM | {"output": "last"}, dense(8, 3)], IDS),
    "sequence": ([EMBEDDING, LSTM | {"type": "GRU"}, dense(8, 4), RELU, {"type": "Flatten"}, dense(20, 3)], IDS),
    "encoder": ([EMBEDDING, ENCODER, {"type": "Flatten"}, dense(20, 3)], IDS),
    "one dimension": ([CONV1D, RELU, {"type": "Flatten"}, dense(24, 3)], SOUND),
    "nested": ([{"type": "Sequential", "layers": [conv(2, 4), RELU]}, *POOL, dense(4, 3)], MAPS),
}


def silence(module: nn.Module) -> None:
    """Makes two of the four features of every layer that makes some zero, whatever goes in."""
    rows = list(SILENT)
    for name, parameter in module.named_parameters():
        width, part = parameter.shape[0], name.rpartition(".")[2]
        if "linear2" in name or "self_attn" in name or ".norm" in name or width == 3:
            continue  # the encoder's inner features alone; the outputs
        layer = module.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Embedding | nn.ConvTranspose2d) and part == "weight":
            parameter.data[:, rows] = 0
        else:
            parameter.data.view(width // 4, 4, -1)[:, rows] = 0  # of each gate


def network(layers: list[dict[str, Any]]) -> tuple[Architecture, nn.Sequential]:
    torch.manual_seed(0)
    architecture = Architecture.model_validate({"layers": layers})
    module = build(architecture.layers)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            assert layer.running_var is not None
            layer.running_var.uniform_(0.5, 1.5)
    return architecture, module.eval()


def built(copy: Copy) -> nn.Sequential:
    module = build(Architecture.model_validate(copy.architecture.model_dump()).layers)
    module.load_state_dict(copy.state)
    return module.eval()


def whole(architecture: Architecture, module: nn.Module) -> Copy:
    return Copy(architecture, module.state_dict(), {})


@pytest.mark.parametrize("name", NETWORKS)
def test_features_that_say_nothing_are_left_out(name: str) -> None:
    layers, example = NETWORKS[name]
    architecture, module = network(layers)
    silence(module)
    copy = narrower(whole(architecture, module), module, (example,), 0.5)
    student = built(copy)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (module, student)]
    assert sizes[1] < 0.95 * sizes[0]
    with torch.no_grad():
        torch.testing.assert_close(student(example), module(example))


def test_the_features_of_the_largest_weights_stay() -> None:
    architecture, module = network([dense(4, 4), RELU, dense(4, 3)])
    with torch.no_grad():
        for row, size in enumerate((0.1, 5.0, 0.2, 4.0)):
            module[0].weight[row] = size
    copy = narrower(whole(architecture, module), module, (torch.randn(2, 4),), 0.5)
    assert torch.equal(copy.state["0.weight"], module[0].weight[[1, 3]])
    assert torch.equal(copy.state["0.bias"], module[0].bias[[1, 3]])
    assert torch.equal(copy.state["2.weight"], module[2].weight[:, [1, 3]])


UNSURE = [
    [conv(2, 4), {"type": "GroupNorm", "num_groups": 2, "num_channels": 4}, *POOL, dense(4, 3)],
    [conv(2, 4), {"type": "PixelShuffle", "upscale_factor": 2}, conv(1, 4), *POOL, dense(4, 3)],
    [conv(2, 4), conv(4, 8, groups=2), *POOL, dense(8, 3)],
    [conv(2, 6), {"type": "Softmax", "dim": 1}, *POOL, dense(6, 3)],
    [conv(2, 4), {"type": "Residual", "layers": [dense(6, 6)]}, *POOL, dense(4, 3)],
]


@pytest.mark.parametrize("layers", UNSURE)
def test_what_is_not_known_to_treat_features_alike_sees_all_of_them(layers: list[dict[str, Any]]) -> None:
    architecture, module = network(layers)
    student = built(narrower(whole(architecture, module), module, (MAPS,), 0.5))
    with torch.no_grad():
        assert student(MAPS).shape == (3, 3)
    assert student[0].weight.shape == module[0].weight.shape


def copies(layers: Sequence[dict[str, Any]], share: float) -> tuple[Copy, nn.Sequential]:
    architecture, module = network(list(layers))
    return shallower(architecture.layers, module.state_dict(), share), module


def test_rows_of_equal_layers_lose_some_evenly() -> None:
    copy, module = copies([EMBEDDING, *[ENCODER] * 5, {"type": "Flatten"}, dense(20, 3)], 0.6)
    assert copy.kept == {"1": "1", "2": "3", "3": "5"}
    student = built(copy)
    by_hand = nn.Sequential(*(module[i] for i in (0, 1, 3, 5, 6, 7)))
    with torch.no_grad():
        assert torch.equal(student(IDS), by_hand(IDS))


def test_rows_inside_other_layers_are_found_and_names_follow() -> None:
    inner = {"type": "Sequential", "layers": [conv(2, 4), RELU, *[BLOCK] * 3]}
    copy, module = copies([inner, *POOL, dense(4, 3)], 0.3)
    assert copy.kept == {"0.2": "0.2"}
    student = built(copy)
    assert torch.equal(student.state_dict()["0.2.layers.0.weight"], module.state_dict()["0.2.layers.0.weight"])
    assert len(student[0]) == 3


def test_layers_without_weights_and_single_ones_stay() -> None:
    copy, module = copies([conv(2, 4), RELU, RELU, *POOL, dense(4, 3)], 0.1)
    assert copy.kept == {}
    assert len(copy.architecture.layers) == len(module)
