"""Resize and Upsample: `interpolate` where torch samples the same points, else a gather along each axis.

Resizing is separable: each axis is resized for itself, by picking the neighbours of every output point and weighting
them (none for nearest, two for linear, four for cubic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import Value
from worker.loading.onnx_ops.node import Node


@dataclass(frozen=True)
class Sampling:
    """How output points map to input points."""

    mode: str
    coordinates: str
    rounding: str
    cubic: float
    exclude_outside: bool

    @property
    def torch_mode(self) -> str | None:
        """The mode of `interpolate` that samples the same points."""
        if self.mode == "nearest":
            return {("asymmetric", "floor"): "nearest", ("half_pixel", "round_prefer_ceil"): "nearest-exact"}.get(
                (self.coordinates, self.rounding)
            )
        if self.coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            return None
        if self.mode == "linear":
            return "linear"
        return "cubic" if self.cubic == -0.75 and not self.exclude_outside else None


# One axis: the input's size, the output's, and their ratio as the file says it.
Axis = tuple[int, int, float]

_COORDINATES: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "half_pixel": lambda x, axis: (x + 0.5) / axis[2] - 0.5,
    "pytorch_half_pixel": lambda x, axis: (x + 0.5) / axis[2] - 0.5 if axis[1] > 1 else x * 0,
    "half_pixel_symmetric": lambda x, axis: (
        axis[0] / 2 * (1 - axis[1] / (axis[0] * axis[2])) + (x + 0.5) / axis[2] - 0.5
    ),
    "align_corners": lambda x, axis: x * ((axis[0] - 1) / (axis[1] - 1)) if axis[1] > 1 else x * 0,
    "asymmetric": lambda x, axis: x / axis[2],
    "tf_half_pixel_for_nn": lambda x, axis: (x + 0.5) / axis[2],
}
_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
}


def resize(
    a: Tensor, scales: Value | None, sizes: Value | None, *, axes: tuple[int, ...] | None, how: tuple[Any, ...]
) -> Tensor:
    """To the given sizes, or by the given scales; `how` are the fields of a Sampling."""
    sampling = Sampling(*how)
    along = tuple(axis % a.ndim for axis in axes) if axes is not None else tuple(range(a.ndim))
    changed = _changed(a, along, _numbers(scales), _numbers(sizes))
    mode = sampling.torch_mode
    spatial = tuple(range(2, a.ndim))
    if mode is not None and 1 <= len(spatial) <= 3 and set(changed) <= set(spatial) and changed:
        return _interpolated(a, mode, changed, sampling, by_size=scales is None)
    for axis, sizes_of_it in changed.items():
        a = _one_axis(a, axis, sizes_of_it, sampling)
    return a


def _numbers(value: Value | None) -> tuple[Any, ...] | None:
    if isinstance(value, Tensor):
        raise Unsupported("computes its scales or sizes out of the data")
    return value if isinstance(value, tuple) or value is None else (value,)


def _changed(
    a: Tensor, along: tuple[int, ...], scales: tuple[Any, ...] | None, sizes: tuple[Any, ...] | None
) -> dict[int, Axis]:
    """The axes whose size or sampling changes."""
    found: dict[int, Axis] = {}
    for i, axis in enumerate(along):
        size = a.shape[axis]
        if sizes is not None:
            found[axis] = (size, sizes[i], 1 if sizes[i] == size else sizes[i] / size)
        elif scales is not None:
            out = math.floor(size * scales[i])
            found[axis] = (size, out, scales[i])
    return {axis: sizes_of_it for axis, sizes_of_it in found.items() if sizes_of_it[2] != 1}


def _interpolated(a: Tensor, mode: str, changed: dict[int, Axis], sampling: Sampling, *, by_size: bool) -> Tensor:
    spatial = range(2, a.ndim)
    names = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}
    name = names[mode][len(spatial) - 1] if mode in names else mode
    if not name:
        for axis, sizes_of_it in changed.items():
            a = _one_axis(a, axis, sizes_of_it, sampling)
        return a
    corners = None if mode.startswith("nearest") else sampling.coordinates == "align_corners"
    if by_size or corners:
        sizes = [changed[axis][1] if axis in changed else a.shape[axis] for axis in spatial]
        return functional.interpolate(a, size=sizes, mode=name, align_corners=corners)
    factors = [float(changed[axis][2]) if axis in changed else 1.0 for axis in spatial]
    return functional.interpolate(
        a, scale_factor=factors, mode=name, align_corners=corners, recompute_scale_factor=False
    )


def _one_axis(a: Tensor, axis: int, sizes: Axis, sampling: Sampling) -> Tensor:
    size, out, _ = sizes
    points = _COORDINATES[sampling.coordinates](torch.arange(out, device=a.device, dtype=torch.float32), sizes)
    if sampling.mode == "nearest":
        nearest = _ROUNDING[sampling.rounding](points).clamp(0, size - 1).to(torch.int64)
        return a.index_select(axis, nearest)
    first = torch.floor(points)
    share = points - first
    taps, weights = _linear(share) if sampling.mode == "linear" else _cubic(share, sampling.cubic)
    places = [first.to(torch.int64) + tap for tap in taps]
    if sampling.exclude_outside:
        weights = [
            torch.where((place >= 0) & (place < size), weight, torch.zeros_like(weight))
            for place, weight in zip(places, weights, strict=True)
        ]
        whole = torch.stack(weights).sum(0)
        weights = [weight / whole for weight in weights]
    form = [-1 if i == axis else 1 for i in range(a.ndim)]
    parts = [
        a.index_select(axis, place.clamp(0, size - 1)) * weight.reshape(form)
        for place, weight in zip(places, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _linear(share: Tensor) -> tuple[tuple[int, ...], list[Tensor]]:
    return (0, 1), [1 - share, share]


def _cubic(share: Tensor, a: float) -> tuple[tuple[int, ...], list[Tensor]]:
    """The four weights of cubic convolution (Keys 1981)."""

    def near(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return (-1, 0, 1, 2), [far(share + 1), near(share), near(1 - share), far(2 - share)]


# --- builders ---------------------------------------------------------------------------------------------------


def build_resize(node: Node) -> Any:
    if node.attribute("antialias", 0) or node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("resizes with antialiasing or a kept aspect ratio")
    if node.since < 11:
        how = (node.attribute("mode", "nearest"), "asymmetric", "floor", -0.75, False)
        return _build(node, _scales(node, 1), None, how)
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    how = (
        node.attribute("mode", "nearest"),
        coordinates,
        node.attribute("nearest_mode", "round_prefer_floor"),
        float(node.attribute("cubic_coeff_a", -0.75)),
        bool(node.attribute("exclude_outside", 0)),
    )
    sizes = node.value(3) if node.has(3) else None
    scales = None
    if sizes is None and node.has(2):
        scales = _scales(node, 2)
    return _build(node, scales, sizes, how)


def build_upsample(node: Node) -> Any:
    how = (node.attribute("mode", "nearest"), "asymmetric", "floor", -0.75, False)
    return _build(node, _scales(node, 1), None, how)


def _scales(node: Node, position: int) -> Any:
    """Known scales as numbers: they are floats, which are not host values of themselves."""
    constant = node.constant(position)
    return node.value(position) if constant is None else tuple(constant.tensor.tolist()) or None


def _build(node: Node, scales: Any, sizes: Any, how: tuple[Any, ...]) -> Any:
    if isinstance(scales, torch.fx.Node | tuple) or sizes is not None:
        if how[0] not in ("nearest", "linear", "cubic") or how[1] not in _COORDINATES or how[2] not in _ROUNDING:
            raise Unsupported(f"resizes {how[0]!r} with coordinates {how[1]!r} rounded by {how[2]!r}")
        return node.call(resize, node.value(0), scales, sizes, axes=node.attribute("axes"), how=how)
    raise Unsupported("says neither scales nor sizes")
