"""Convolutions and pooling: torch's own, with what ONNX pads unevenly padded before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.node import Node
from worker.loading.onnx_ops.origins import whole

Sizes = tuple[int, ...]

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


def pad_spatial(a: Tensor, *, pads: Sizes, value: float) -> Tensor:
    """Begin pads of every spatial axis, then end pads."""
    half = len(pads) // 2
    order = [width for axis in reversed(range(half)) for width in (pads[axis], pads[half + axis])]
    return functional.pad(a, order, value=value)


def pad_same(a: Tensor, *, kernel: Sizes, stride: Sizes, dilation: Sizes, upper: bool, value: float) -> Tensor:
    """So that each axis gives ceil(size / stride) windows; what is odd goes to the end (`upper`) or the beginning."""
    rows = zip(a.shape[2:], kernel, stride, dilation, strict=True)
    totals = [((size + step - 1) // step - 1) * step + (width - 1) * gap + 1 - size for size, width, step, gap in rows]
    return pad_spatial(a, pads=_halves(totals, upper=upper), value=value)


def convolution(
    a: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int, stride: Sizes, dilation: Sizes
) -> Tensor:
    """With a kernel that is computed while the module runs; padding has been done."""
    functions = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
    return functions[len(stride)](a, weight, bias, stride=stride, dilation=dilation, groups=groups)


def crop(a: Tensor, *, pads: Sizes) -> Tensor:
    """Without so many elements at the beginning and the end of every spatial axis."""
    half = len(pads) // 2
    for axis in range(half):
        a = a.narrow(2 + axis, pads[axis], a.shape[2 + axis] - pads[axis] - pads[half + axis])
    return a


def max_pool(a: Tensor, *, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil: bool) -> Tensor:
    return _MAX_POOL[len(kernel)](a, kernel, stride, padding, dilation, ceil)


def average_pool(a: Tensor, *, kernel: Sizes, stride: Sizes, padding: Sizes, ceil: bool, counts_pads: bool) -> Tensor:
    return _AVERAGE_POOL[len(kernel)](a, kernel, stride, padding, ceil, counts_pads)


def average_of_inside(a: Tensor, *, pads: Sizes, kernel: Sizes, stride: Sizes) -> Tensor:
    """The mean over what of a window lies in the input, for uneven pads."""
    pool = _AVERAGE_POOL[len(kernel)]
    inside = pool(pad_spatial(torch.ones_like(a), pads=pads, value=0.0), kernel, stride)
    return pool(pad_spatial(a, pads=pads, value=0.0), kernel, stride) / inside


def global_average(a: Tensor) -> Tensor:
    return a.mean(tuple(range(2, a.ndim)), keepdim=True)


def global_max(a: Tensor) -> Tensor:
    return a.amax(tuple(range(2, a.ndim)), keepdim=True)


def local_response(a: Tensor, *, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Local response normalization (Krizhevsky et al. 2012)."""
    squares = functional.pad(a.square().unsqueeze(1), [0, 0] * (a.ndim - 2) + [(size - 1) // 2, size // 2])
    sums = squares.unfold(2, size, 1).sum(-1).squeeze(1)
    return a / (bias + alpha / size * sums) ** beta


# --- builders ---------------------------------------------------------------------------------------------------


class _Window:
    """Kernel, stride, dilation and pads of a node, spread over its spatial axes."""

    def __init__(self, node: Node, kernel: Sizes, *, pools: bool = False) -> None:
        self.kernel = kernel
        self.stride: Sizes = node.attribute("strides") or (1,) * len(kernel)
        self.dilation: Sizes = node.attribute("dilations") or (1,) * len(kernel)
        self.auto: str = node.attribute("auto_pad", "NOTSET")
        given: Sizes = node.attribute("pads") or (0,) * (2 * len(kernel))
        self.pads = given if self.auto in ("NOTSET", "") else (0,) * (2 * len(kernel))
        if (
            len({len(self.stride), len(self.dilation), len(kernel), len(self.pads) // 2}) > 1
            or len(kernel) not in _CONV
        ):
            raise Unsupported(f"has a kernel of {len(kernel)} dimensions and strides or pads of others")
        if min(self.pads) < 0 or min(self.stride) < 1 or min(self.dilation) < 1:
            raise Unsupported("has negative pads, strides or dilations")
        self._pools = pools

    @property
    def same(self) -> bool:
        return self.auto in ("SAME_UPPER", "SAME_LOWER")

    @property
    def beyond(self) -> bool:
        """Whether the pads are of a kind that torch's own layers do not take: uneven, or too wide for a pooling."""
        half = len(self.kernel)
        extents = [(width - 1) * gap + 1 for width, gap in zip(self.kernel, self.dilation, strict=True)]
        wide = self._pools and any(pad > extent // 2 for pad, extent in zip(self.pads, extents * 2, strict=True))
        return self.pads[:half] != self.pads[half:] or wide

    @property
    def padding(self) -> Sizes:
        """The pads as torch takes them; none where they are done before."""
        half = len(self.kernel)
        return (0,) * half if self.same or self.beyond else self.pads[:half]

    def padded(self, node: Node, argument: Any, value: float) -> Any:
        """The input with the pads that torch cannot be told."""
        if self.same:
            options = {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
            return node.call(pad_same, argument, **options, upper=self.auto == "SAME_UPPER", value=value)
        return node.call(pad_spatial, argument, pads=self.pads, value=value) if self.beyond else argument


def build_conv(node: Node) -> Any:
    weight = node.constant(1)
    if weight is None:
        return _build_computed_conv(node)
    out, per_group, *kernel = weight.tensor.shape
    window = _Window(node, tuple(kernel))
    groups = node.attribute("group", 1)
    bias = node.constant(2)
    if node.has(2) and bias is None:
        raise Unsupported("has a bias that is computed")
    with torch.device("meta"):
        layer = _CONV[len(kernel)](
            per_group * groups,
            out,
            tuple(kernel),
            stride=window.stride,
            padding=window.padding,
            dilation=window.dilation,
            groups=groups,
            bias=bias is not None,
        )
    path, output = node.layer(layer, 1, window.padded(node, node.value(0), 0.0))
    node.assign(path, "weight", 1)
    if bias is not None:
        node.assign(path, "bias", 2)
    return output


def _build_computed_conv(node: Node) -> Any:
    shape = node.attribute("kernel_shape")
    if shape is None:
        raise Unsupported("has a kernel that is computed and of unknown size")
    window = _Window(node, shape)
    argument = window.padded(node, node.value(0), 0.0)
    if any(window.padding):
        argument = node.call(pad_spatial, argument, pads=window.pads, value=0.0)
    third = node.tensor(2) if node.has(2) else None
    options = {"groups": node.attribute("group", 1), "stride": window.stride, "dilation": window.dilation}
    return node.call(convolution, argument, node.tensor(1), third, **options)


def build_conv_transpose(node: Node) -> Any:
    """torch takes even pads; uneven ones are cut off the output."""
    weight, bias = node.constant(1), node.constant(2)
    if weight is None or (node.has(2) and bias is None):
        raise Unsupported("has a kernel or bias that is computed")
    channels, per_group, *kernel = weight.tensor.shape
    window = _Window(node, tuple(kernel))
    extra: Sizes = node.attribute("output_padding") or (0,) * len(kernel)
    if node.attribute("output_shape") or window.same:
        window.pads = _pads_for_output(node, window, extra)
        window.auto = "NOTSET"
    groups = node.attribute("group", 1)
    cropped = window.beyond or any(
        a >= max(s, d) for a, s, d in zip(extra, window.stride, window.dilation, strict=True)
    )
    with torch.device("meta"):
        layer = _TRANSPOSED[len(kernel)](
            channels,
            per_group * groups,
            tuple(kernel),
            stride=window.stride,
            padding=(0,) * len(kernel) if cropped else window.padding,
            output_padding=extra,
            groups=groups,
            bias=bias is not None,
            dilation=window.dilation,
        )
    path, output = node.layer(layer, 1, node.value(0))
    node.assign(path, "weight", 1, whole)
    if bias is not None:
        node.assign(path, "bias", 2)
    return node.call(crop, output, pads=window.pads) if cropped else output


def _pads_for_output(node: Node, window: _Window, extra: Sizes) -> Sizes:
    """The pads that give `output_shape`, or for SAME the input's size times the stride. Raises Unsupported."""
    sizes = _known_sizes(node, window)
    wanted = node.attribute("output_shape") or [size * step for size, step in zip(sizes, window.stride, strict=True)]
    rows = zip(sizes, window.stride, window.kernel, window.dilation, extra, wanted[-len(sizes) :], strict=True)
    totals = [step * (size - 1) + more + (width - 1) * gap + 1 - goal for size, step, width, gap, more, goal in rows]
    return _halves(totals, upper=window.auto == "SAME_UPPER")


def _known_sizes(node: Node, window: _Window) -> Sizes:
    """The input's spatial sizes. Raises Unsupported where they are open."""
    shape = node.shape(0) or ()
    sizes = tuple(size for size in shape[2:] if size is not None)
    if len(sizes) != len(window.kernel):
        raise Unsupported("pads by the size of an input whose size is open")
    return sizes


def _halves(totals: Sequence[int], *, upper: bool) -> Sizes:
    """Pads of every axis split in two; what is odd goes to the end (`upper`) or the beginning."""
    small = tuple(max(0, total) // 2 for total in totals)
    large = tuple(max(0, total) - max(0, total) // 2 for total in totals)
    return (*small, *large) if upper else (*large, *small)


def build_max_pool(node: Node) -> Any:
    if node.wants(1):
        raise Unsupported("gives the places of its maxima")
    window = _Window(node, node.attribute("kernel_shape"), pools=True)
    argument = window.padded(node, node.value(0), float("-inf"))
    options = {"kernel": window.kernel, "stride": window.stride, "dilation": window.dilation}
    ceil = bool(node.attribute("ceil_mode", 0))
    return node.call(max_pool, argument, **options, padding=window.padding, ceil=ceil)


def build_average_pool(node: Node) -> Any:
    window = _Window(node, node.attribute("kernel_shape"), pools=True)
    counts, ceil = (bool(node.attribute(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    if any(gap != 1 for gap in window.dilation):
        raise Unsupported("averages over windows with gaps")
    options = {"kernel": window.kernel, "stride": window.stride}
    if counts or not (window.same or window.beyond):
        argument = window.padded(node, node.value(0), 0.0)
        return node.call(average_pool, argument, **options, padding=window.padding, ceil=ceil, counts_pads=counts)
    if ceil:
        raise Unsupported("averages over uneven pads with ceil_mode")
    return node.call(average_of_inside, node.value(0), **options, pads=_fixed_pads(node, window))


def _fixed_pads(node: Node, window: _Window) -> Sizes:
    """The pads as numbers, which SAME computes of the input's size. Raises Unsupported where that is open."""
    if not window.same:
        return window.pads
    rows = zip(_known_sizes(node, window), window.kernel, window.stride, strict=True)
    totals = [(-(-size // step) - 1) * step + width - size for size, width, step in rows]
    return _halves(totals, upper=window.auto == "SAME_UPPER")


def build_local_response(node: Node) -> Any:
    options = {name: float(node.attribute(name, d)) for name, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))}
    return node.call(local_response, node.value(0), size=node.attribute("size"), **options)
