"""State dicts of other people's networks as declarative architectures, with their weights under the names of ours.

Where a network turns its axes round before its first dense layer, the columns of that layer are put into the order
that Flatten gives: the same function without an operation that torch.nn has no layer for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layer = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """A network as a client would upload it: `spec`, and the state dict that belongs to it."""

    spec: dict[str, Any]
    state: dict[str, Tensor]


def renamed(state: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of each own layer under the name of its place: `conv1.weight` as `0.weight`."""
    return {
        f"{places[layer]}.{kind}": tensor.contiguous()
        for (layer, _, kind), tensor in ((name.rpartition("."), tensor) for name, tensor in state.items())
    }


def reordered(weight: Tensor, *, of: tuple[int, ...], by: tuple[int, ...]) -> Tensor:
    """The columns of [out, in] for inputs flattened from axes of sizes `of`, instead of those permuted `by`."""
    permuted = weight.reshape(-1, *(of[axis] for axis in by))
    back = [1 + by.index(axis) for axis in range(len(of))]
    return permuted.permute(0, *back).reshape(weight.shape)


# ---------------------------------------------------------------------------------------------------------------------
# CREPE (Kim, Salamon, Li & Bello 2018): the pitch of 64 ms of sound as 360 classes that may be true side by side.

CREPE_CHANNELS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
CREPE_WINDOW = 1024
CREPE_FRAMES = 4  # that are left of the window before the dense layer


def crepe(size: str, state: Mapping[str, Tensor]) -> Declared:
    layers: list[Layer] = [{"type": "Unflatten", "dim": 1, "unflattened_size": [1, CREPE_WINDOW, 1]}]
    places, channels = {}, 1
    for i, width in enumerate(CREPE_CHANNELS[size], start=1):
        first = i == 1
        places |= {f"conv{i}": str(len(layers) + 1), f"conv{i}_BN": str(len(layers) + 3)}
        layers += [
            {"type": "ZeroPad2d", "padding": [0, 0, 254, 254] if first else [0, 0, 31, 32]},
            {
                "type": "Conv2d",
                "in_channels": channels,
                "out_channels": width,
                "kernel_size": [512 if first else 64, 1],
                "stride": [4 if first else 1, 1],
            },
            {"type": "ReLU"},
            {"type": "BatchNorm2d", "num_features": width, "eps": 0.0010000000474974513, "momentum": 0.0},
            {"type": "MaxPool2d", "kernel_size": [2, 1]},
        ]
        channels = width
    places["classifier"] = str(len(layers) + 1)
    layers += [{"type": "Flatten"}, {"type": "Linear", "in_features": CREPE_FRAMES * channels, "out_features": 360}]
    weights = renamed(state, places)
    dense = places["classifier"] + ".weight"
    weights[dense] = reordered(weights[dense], of=(channels, CREPE_FRAMES), by=(1, 0))
    spec = {"task": "multi-label", "architecture": {"layers": layers}, "input": {"shape": [CREPE_WINDOW]}}
    return Declared(spec, weights)


# ---------------------------------------------------------------------------------------------------------------------
# MTCNN (Zhang, Zhang, Li & Qiao 2016): three networks that find faces. Their heads side by side are one output: the
# probabilities of "no face" and "face", the box (4), and for the last network five points of the face (10).


def _prelu(kind: str, *channels: int, **options: Any) -> list[Layer]:
    """A weighted layer and its PReLU."""
    ins, outs = channels
    names = ("in_features", "out_features") if kind == "Linear" else ("in_channels", "out_channels")
    return [
        {"type": kind, names[0]: ins, names[1]: outs} | options,
        {"type": "PReLU", "num_parameters": outs},
    ]


def _pool(size: int) -> Layer:
    return {"type": "MaxPool2d", "kernel_size": size, "stride": 2, "ceil_mode": True}


def _heads(kind: str, ins: int, outs: tuple[int, ...], **options: Any) -> Layer:
    names = ("in_features", "out_features") if kind == "Linear" else ("in_channels", "out_channels")
    branches: list[list[Layer]] = [[{"type": kind, names[0]: ins, names[1]: out} | options] for out in outs]
    branches[0].append({"type": "Softmax", "dim": 1})
    return {"type": "Parallel", "branches": branches, "join": "concat", "dim": 1}


def _mtcnn(side: int, layers: list[Layer], own: list[str], heads: list[str], state: Mapping[str, Tensor]) -> Declared:
    """`own` are the names of the weighted layers in order, `heads` those of the branches at the end."""
    weighted = [i for i, layer in enumerate(layers) if layer["type"] in ("Conv2d", "Linear", "PReLU")]
    places = dict(zip(own, map(str, weighted), strict=True))
    places |= {head: f"{len(layers) - 1}.branches.{i}.0" for i, head in enumerate(heads)}
    spec = {"task": "regression", "architecture": {"layers": layers}, "input": {"shape": [3, side, side]}}
    return Declared(spec, renamed(state, places))


def pnet(state: Mapping[str, Tensor]) -> Declared:
    layers = [
        *_prelu("Conv2d", 3, 10, kernel_size=3),
        _pool(2),
        *_prelu("Conv2d", 10, 16, kernel_size=3),
        *_prelu("Conv2d", 16, 32, kernel_size=3),
        _heads("Conv2d", 32, (2, 4), kernel_size=1),
    ]
    own = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "prelu")]
    return _mtcnn(12, layers, own, ["conv4_1", "conv4_2"], state)


def rnet(state: Mapping[str, Tensor]) -> Declared:
    layers = [
        *_prelu("Conv2d", 3, 28, kernel_size=3),
        _pool(3),
        *_prelu("Conv2d", 28, 48, kernel_size=3),
        _pool(3),
        *_prelu("Conv2d", 48, 64, kernel_size=2),
        {"type": "Flatten"},
        *_prelu("Linear", 576, 128),
        _heads("Linear", 128, (2, 4)),
    ]
    own = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "prelu")] + ["dense4", "prelu4"]
    state = {**state, "dense4.weight": reordered(state["dense4.weight"], of=(64, 3, 3), by=(2, 1, 0))}
    return _mtcnn(24, layers, own, ["dense5_1", "dense5_2"], state)


def onet(state: Mapping[str, Tensor]) -> Declared:
    layers = [
        *_prelu("Conv2d", 3, 32, kernel_size=3),
        _pool(3),
        *_prelu("Conv2d", 32, 64, kernel_size=3),
        _pool(3),
        *_prelu("Conv2d", 64, 64, kernel_size=3),
        _pool(2),
        *_prelu("Conv2d", 64, 128, kernel_size=2),
        {"type": "Flatten"},
        *_prelu("Linear", 1152, 256),
        _heads("Linear", 256, (2, 4, 10)),
    ]
    own = [f"{kind}{i}" for i in (1, 2, 3, 4) for kind in ("conv", "prelu")] + ["dense5", "prelu5"]
    state = {**state, "dense5.weight": reordered(state["dense5.weight"], of=(128, 3, 3), by=(2, 1, 0))}
    return _mtcnn(48, layers, own, ["dense6_1", "dense6_2", "dense6_3"], state)


# ---------------------------------------------------------------------------------------------------------------------
# Silero VAD: whether 32 ms of sound (with 4 ms before them) hold speech, with the recurrent state at its start.

SILERO_WINDOW = 576
SILERO_BINS = 129


def silero(state: Mapping[str, Tensor]) -> Declared:
    """The magnitude of the Fourier transform is a pooling by the 2-norm over the real and the imaginary channel."""
    convs = [(SILERO_BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
    layers: list[Layer] = [
        {"type": "ReflectionPad1d", "padding": [0, 64]},
        {
            "type": "Conv1d",
            "in_channels": 1,
            "out_channels": 2 * SILERO_BINS,
            "kernel_size": 256,
            "stride": 128,
            "bias": False,
        },
        {"type": "Unflatten", "dim": 1, "unflattened_size": [1, 2 * SILERO_BINS]},
        {"type": "LPPool2d", "norm_type": 2.0, "kernel_size": [2, 1]},
        {"type": "Flatten", "start_dim": 1, "end_dim": 2},
    ]
    places = {"stft_conv": "1"}
    for i, (ins, outs, stride) in enumerate(convs, start=1):
        places[f"conv{i}"] = str(len(layers))
        layers += [
            {
                "type": "Conv1d",
                "in_channels": ins,
                "out_channels": outs,
                "kernel_size": 3,
                "stride": stride,
                "padding": 1,
            },
            {"type": "ReLU"},
        ]
    places |= {"lstm_cell": str(len(layers) + 2), "final_conv": str(len(layers) + 4)}
    layers += [
        {"type": "Flatten"},
        {"type": "Unflatten", "dim": 1, "unflattened_size": [1, 128]},
        {"type": "LSTM", "input_size": 128, "hidden_size": 128, "output": "last"},
        {"type": "ReLU"},
        {"type": "Linear", "in_features": 128, "out_features": 1},
    ]
    weights = renamed(state, places)
    # Real and imaginary part of a frequency one after the other instead of all real ones first.
    weights["1.weight"] = weights["1.weight"].unflatten(0, (2, SILERO_BINS)).transpose(0, 1).flatten(0, 1).contiguous()
    weights = {_first_layer(name, places["lstm_cell"]): tensor for name, tensor in weights.items()}
    weights[f"{places['final_conv']}.weight"] = weights[f"{places['final_conv']}.weight"].squeeze(-1)
    spec = {"task": "multi-label", "architecture": {"layers": layers}, "input": {"shape": [1, SILERO_WINDOW]}}
    return Declared(spec, weights)


def _first_layer(name: str, lstm: str) -> str:
    """A cell's weights as those of a recurrent layer's first layer."""
    return f"{name}_l0" if name.startswith(f"{lstm}.") else name


def load_state(path: Any) -> dict[str, Tensor]:
    """A state dict that torch.save wrote."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
