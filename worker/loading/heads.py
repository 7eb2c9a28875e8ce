"""What a file's output is of a network's logits, where a graph ends in probabilities.

Training wants logits: a softmax in front of a loss that holds one would be applied twice. So a module ends before the
file's last activation, and the files that are delivered end behind it, as the uploaded one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

from app.contract.facts import OutputKind, Task

# Tasks whose loss is on logits.
_LOGIT_TASKS: frozenset[Task] = frozenset(
    {
        *("image-classification", "text-classification", "audio-classification", "token-classification"),
        *("multi-label", "causal-lm", "masked-lm"),
    }
)
# Probabilities below are taken as this: float32's smallest, whose logarithm is -87.
TINY = float(np.finfo(np.float32).tiny)


class Head(nn.Module):
    """The end of a network: logits while it is trained, the file's own output while it is written (`delivering`)."""

    def __init__(self, kind: OutputKind) -> None:
        super().__init__()
        self.kind = kind
        self.delivers = False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.delivers:
            return _ACTIVATIONS[self.kind](inputs)
        if self.kind == "binary":  # two classes; softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]
            return torch.cat((torch.zeros_like(inputs), inputs), dim=-1)
        return inputs


_ACTIVATIONS: dict[OutputKind, Callable[[Tensor], Tensor]] = {
    "logits": lambda x: x,
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "sigmoid": torch.sigmoid,
    "binary": torch.sigmoid,
}


@contextlib.contextmanager
def delivering(module: nn.Module) -> Iterator[None]:
    """Within the block the module gives what its file gives."""
    heads = [head for head in module.modules() if isinstance(head, Head)]
    for head in heads:
        head.delivers = True
    try:
        yield
    finally:
        for head in heads:
            head.delivers = False


def to_logits(kind: OutputKind, outputs: np.ndarray) -> np.ndarray:
    """A file's output as float32 logits: those of the same probabilities."""
    values = outputs.astype(np.float32)
    if kind == "logits":
        return values
    # Not a number stays that.
    logarithm = np.log(np.maximum(values, TINY))
    if kind == "softmax":
        return logarithm
    opposite = np.log(np.maximum(1 - values, TINY))
    return logarithm - opposite if kind == "sigmoid" else np.concatenate((opposite, logarithm), axis=-1)


def to_outputs(kind: OutputKind, logits: np.ndarray) -> np.ndarray:
    """Logits as the file gives them."""
    if kind == "binary":
        logits = logits[..., 1:] - logits[..., :1]
    activated: np.ndarray = _ACTIVATIONS[kind](torch.from_numpy(logits)).numpy()
    return activated


@dataclass(frozen=True)
class Ending:
    """How a graph ends: the value that holds its logits, and what is made of them."""

    logits: str
    kind: OutputKind


def find_ending(proto: ModelProto, output: str, shape: tuple[int | None, ...] | None, task: Task) -> Ending:
    """Where the logits of a graph's output are. Only tasks that are trained on logits have an activation taken off."""
    plain = Ending(output, "logits")
    if task not in _LOGIT_TASKS or shape is None or len(shape) < 2:
        return plain
    makers = {name: node for node in proto.graph.node for name in node.output if name}
    # Before opset 13 a softmax without an axis starts at dimension 1.
    default = -1 if next(entry.version for entry in proto.opset_import if entry.domain == "") >= 13 else 1
    node = _maker(makers, output)
    if node is None:
        return plain
    if node.op_type == "Softmax" and _axis(node, default) in (-1, len(shape) - 1):
        return Ending(node.input[0], "softmax")
    if node.op_type == "Sigmoid":
        alone = shape[-1] == 1 and task != "multi-label"
        return Ending(node.input[0], "binary" if alone else "sigmoid")
    if node.op_type == "Div":
        logits = _written_out_softmax(makers, node)
        return plain if logits is None else Ending(logits, "softmax")
    return plain


def _written_out_softmax(makers: Mapping[str, NodeProto], node: NodeProto) -> str | None:
    """The x of e / sum(e) with e = exp(x - max(x)), as converters from TensorFlow and JAX write it.

    Along which axis is not asked: a module that ends at x is compared with the graph.
    """
    top, total = _maker(makers, node.input[0]), _maker(makers, node.input[1], _SPREADS)
    if top is None or total is None or (top.op_type, total.op_type) != ("Exp", "ReduceSum"):
        return None
    shifted = _maker(makers, top.input[0])
    if _maker(makers, total.input[0]) is not top or shifted is None or shifted.op_type != "Sub":
        return None
    largest = _maker(makers, shifted.input[1], _SPREADS)
    if largest is None or largest.op_type != "ReduceMax" or largest.input[0] != shifted.input[0]:
        return None
    return str(shifted.input[0])


# What brings one value a row back to the row's length.
_SPREADS = frozenset({"Identity", "Reshape", "Expand", "Unsqueeze", "Max"})


def _maker(
    makers: Mapping[str, NodeProto], name: str, through: frozenset[str] = frozenset({"Identity"})
) -> NodeProto | None:
    """The node that makes a value, seen through operators that compute nothing; None for an input or a constant."""
    node = makers.get(name)
    while node is not None and node.op_type in through:
        node = next(
            (makers[source] for source in node.input if source in makers and not _is_constant(makers, source)), None
        )
    return node


def _is_constant(makers: Mapping[str, NodeProto], name: str) -> bool:
    return makers[name].op_type == "Constant"


def _axis(node: NodeProto, default: int | None) -> int | None:
    """The node's one axis, where it is an attribute."""
    for attribute in node.attribute:
        if attribute.name == "axis":
            return int(attribute.i)
        if attribute.name == "axes" and len(attribute.ints) == 1:
            return int(attribute.ints[0])
    return default
