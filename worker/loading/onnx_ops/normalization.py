"""Normalizations: torch's layers where gain and shift are constants, functions otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.node import Node

# What BatchNorm and InstanceNorm are called for an input of so many dimensions.
_BATCH: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


class BatchNorm(_BatchNorm):
    """BatchNorm over dimension 1 of an input whose number of dimensions the file does not say."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any will do."""


def layer_norm(a: Tensor, gain: Tensor | None, shift: Tensor | None, *, axis: int, eps: float) -> Tensor:
    """Over `axis` and those behind it (Ba, Kiros & Hinton 2016)."""
    return functional.layer_norm(a, a.shape[axis:], gain, shift, eps)


def rms_norm(a: Tensor, gain: Tensor, *, axis: int, eps: float) -> Tensor:
    """Over `axis` and those behind it (Zhang & Sennrich 2019)."""
    return functional.rms_norm(a, a.shape[axis:], None, eps) * gain


def group_norm(a: Tensor, gain: Tensor, shift: Tensor, *, groups: int, eps: float) -> Tensor:
    return functional.group_norm(a, groups, gain, shift, eps)


def instance_norm(a: Tensor, gain: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    return functional.instance_norm(a, weight=gain, bias=shift, eps=eps)


def lp_norm(a: Tensor, *, axis: int, p: int) -> Tensor:
    """Divided by its norm along an axis."""
    return a / torch.linalg.vector_norm(a, ord=p, dim=axis, keepdim=True)


def mean_variance(a: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    variance, mean = torch.var_mean(a, axes, correction=0, keepdim=True)
    return (a - mean) / (torch.sqrt(variance) + 1e-9)  # the constant of the operator's definition


def softmax(a: Tensor, *, axis: int) -> Tensor:
    return torch.softmax(a, axis)


def log_softmax(a: Tensor, *, axis: int) -> Tensor:
    return torch.log_softmax(a, axis)


def flat_softmax(a: Tensor, *, axis: int, log: bool) -> Tensor:
    """Before opset 13: over all dimensions from `axis` on, taken as one."""
    axis = axis % a.ndim
    rows = a.flatten(axis)
    return (torch.log_softmax(rows, -1) if log else torch.softmax(rows, -1)).reshape(a.shape)


def hardmax(a: Tensor, *, axis: int) -> Tensor:
    """1 at the first maximum."""
    return torch.zeros_like(a).scatter(axis, a.argmax(axis, keepdim=True), 1.0)


# --- builders ---------------------------------------------------------------------------------------------------


def build_batch_norm(node: Node) -> Any:
    if node.attribute("training_mode", 0) or node.wants(1):
        raise Unsupported("is in training mode")
    gain = node.constant(1)
    if gain is None or any(node.constant(position) is None for position in (2, 3, 4)):
        raise Unsupported("has statistics that are computed")
    shape = node.shape(0)
    kind = _BATCH.get(0 if shape is None else len(shape), BatchNorm)
    # ONNX's momentum is the share of the old statistics, torch's that of the new ones.
    options = {"eps": float(node.attribute("epsilon", 1e-5)), "momentum": 1 - float(node.attribute("momentum", 0.9))}
    path, output = node.layer(kind(len(gain.tensor), **options), 1, node.value(0))
    for position, name in enumerate(("weight", "bias", "running_mean", "running_var"), start=1):
        node.assign(path, name, position)
    return output


def build_instance_norm(node: Node) -> Any:
    gain, shift, shape = node.constant(1), node.constant(2), node.shape(0)
    eps, rank = float(node.attribute("epsilon", 1e-5)), 0 if shape is None else len(shape)
    if gain is None or shift is None or rank not in _INSTANCE:
        return node.call(instance_norm, node.value(0), node.tensor(1), node.tensor(2), eps=eps)
    path, output = node.layer(_INSTANCE[rank](len(gain.tensor), eps=eps, affine=True), 1, node.value(0))
    node.assign(path, "weight", 1)
    node.assign(path, "bias", 2)
    return output


def build_layer_norm(node: Node) -> Any:
    if node.wants(1) or node.wants(2):
        raise Unsupported("gives its mean or deviation")
    axis, eps = node.attribute("axis", -1), float(node.attribute("epsilon", 1e-5))
    gain, shift = node.constant(1), node.constant(2)
    if axis >= 0:
        axis -= node.rank(0)
    if gain is None or gain.tensor.ndim != -axis or (node.has(2) and shift is None):
        third = node.tensor(2) if node.has(2) else None
        return node.call(layer_norm, node.value(0), node.tensor(1), third, axis=axis, eps=eps)
    layer = nn.LayerNorm(tuple(gain.tensor.shape), eps=eps, bias=shift is not None)
    path, output = node.layer(layer, 1, node.value(0))
    node.assign(path, "weight", 1)
    if shift is not None:
        node.assign(path, "bias", 2)
    return output


def build_rms_norm(node: Node) -> Any:
    axis, eps = node.attribute("axis", -1), float(node.attribute("epsilon", 1e-5))
    gain = node.constant(1)
    if axis >= 0:
        axis -= node.rank(0)
    if gain is None or gain.tensor.ndim != -axis:
        return node.call(rms_norm, node.value(0), node.tensor(1), axis=axis, eps=eps)
    path, output = node.layer(nn.RMSNorm(tuple(gain.tensor.shape), eps=eps), 1, node.value(0))
    node.assign(path, "weight", 1)
    return output


def build_group_norm(node: Node) -> Any:
    """Gain and shift are one a channel since opset 21, and were one a group before."""
    groups, eps = node.attribute("num_groups"), float(node.attribute("epsilon", 1e-5))
    gain, shift = node.constant(1), node.constant(2)
    if gain is None or shift is None:
        raise Unsupported("has a gain or shift that is computed")
    if node.since >= 21:
        path, output = node.layer(nn.GroupNorm(groups, len(gain.tensor), eps), 1, node.value(0))
        node.assign(path, "weight", 1)
        node.assign(path, "bias", 2)
        return output
    return node.call(grouped_norm, node.value(0), gain, shift, groups=groups, eps=eps)


def grouped_norm(a: Tensor, gain: Tensor, shift: Tensor, *, groups: int, eps: float) -> Tensor:
    """With one gain and shift a group."""
    width = a.shape[1] // groups
    return functional.group_norm(a, groups, gain.repeat_interleave(width), shift.repeat_interleave(width), eps)


def build_softmax(node: Node) -> Any:
    log = node.op == "LogSoftmax"
    if node.since >= 13:
        return node.call(log_softmax if log else softmax, node.value(0), axis=node.attribute("axis", -1))
    axis, shape = node.attribute("axis", 1), node.shape(0)
    if shape is not None and axis % max(1, len(shape)) == len(shape) - 1:
        return node.call(log_softmax if log else softmax, node.value(0), axis=-1)
    return node.call(flat_softmax, node.value(0), axis=axis, log=log)


def build_hardmax(node: Node) -> Any:
    shape = node.shape(0)
    axis = node.attribute("axis", -1 if node.since >= 13 else 1)
    if node.since < 13 and (shape is None or axis % max(1, len(shape)) != len(shape) - 1):
        raise Unsupported("works over several dimensions at once")
    return node.call(hardmax, node.value(0), axis=axis)


def build_lp_norm(node: Node) -> Any:
    return node.call(lp_norm, node.value(0), axis=node.attribute("axis", -1), p=node.attribute("p", 2))


def build_mean_variance(node: Node) -> Any:
    return node.call(mean_variance, node.value(0), axes=node.attribute("axes", (0, 2, 3)))


def build_dropout(node: Node) -> Any:
    """Nothing outside of training; in training what its ratio says."""
    if node.wants(1):
        raise Unsupported("gives its mask")
    ratio = node.attribute("ratio", 0.5)
    if node.since >= 12:
        ratio = float(node.known(1, "ratio")) if node.has(1) else 0.5
        if node.has(2) and node.known(2, "training mode"):
            raise Unsupported("is in training mode")
    value = node.value(0)
    if not isinstance(value, fx.Node) or not 0 <= ratio < 1:
        return value
    path = node.builder.layer(node.proto.name or "dropout", nn.Dropout(ratio))
    return node.builder.graph.call_module(path, (value,))
