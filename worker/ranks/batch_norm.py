"""BatchNorm over the batches of all ranks, as if the whole batch lay in one process.

torch's SyncBatchNorm does the same for accelerators alone. The mean and the variance of the whole are put together from
those of the parts (Chan, Golub & LeVeque 1979), which loses no digits to cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from worker.ranks.ranks import Ranks


class Synchronized:
    """The BatchNorm layers of a module while it trains in several processes."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        # Those that compute what the class says: others' subclasses do more than that, and see their own rank.
        self.layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and type(layer).forward is _BatchNorm.forward
        ]
        self.ranks = ranks
        # A rank that has no sample of a batch takes part with a stand-in, which does not count.
        self.counts = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, the layers in training mode see all ranks, each of which has to call them equally often."""
        if self.ranks.size == 1:
            yield
            return
        for layer in self.layers:
            layer.forward = _Forward(layer, self)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


class _Forward:
    """In the place of a layer's forward."""

    def __init__(self, layer: _BatchNorm, together: Synchronized) -> None:
        self._layer, self._together = layer, together

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self._layer
        if not (layer.training or layer.running_mean is None):
            return type(layer).forward(layer, inputs)
        outputs, mean, variance, count = normalized(
            inputs, layer.weight, layer.bias, layer.eps, self._together.ranks, self._together.counts
        )
        if layer.training and layer.running_mean is not None and layer.running_var is not None:
            with torch.no_grad():
                momentum = layer.momentum
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked += 1
                    momentum = 1 / float(layer.num_batches_tracked) if momentum is None else momentum
                unbiased = variance * (count / (count - 1).clamp(min=1))
                layer.running_mean.lerp_(mean.to(layer.running_mean), momentum or 0.0)
                layer.running_var.lerp_(unbiased.to(layer.running_var), momentum or 0.0)
        return outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("a module is not copied while its statistics are shared between processes")


def normalized(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks, counts: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`inputs` [batch, channels, …] normalized over all ranks; mean, biased variance and count of the whole.

    The gradient is that of the whole batch's mean and variance, where each rank lowers its share of the loss.
    Ioffe & Szegedy 2015.
    """
    outputs, mean, variance, count = _Normalize.apply(inputs, weight, bias, eps, ranks, counts)
    return outputs, mean, variance, count


def _combined(inputs: Tensor, ranks: Ranks, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance a channel over all ranks, float32, and the number of values a channel."""
    values = inputs.detach()
    mean, variance = (found.float() for found in torch.batch_norm_update_stats(values, None, None, 0.0))
    own = torch.full_like(mean, values.numel() // values.shape[1] if counts else 0)
    n, means, variances = ranks.gathered(torch.stack((own, mean, variance))).unbind(1)
    count = n.sum(0)
    if bool((count <= 1).any()):
        raise ValueError("Expected more than 1 value per channel when training")  # in torch's own words
    whole = (n * means).sum(0) / count
    return whole, (n * (variances + (means - whole) ** 2)).sum(0) / count, count


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _combined(inputs, ranks, counts)
        ctx.ranks, ctx.eps, ctx.counts = ranks, eps, counts
        ctx.save_for_backward(inputs, weight, mean, variance, count)
        outputs = functional.batch_norm(inputs, mean, variance, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return outputs, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """As if the statistics were constants, and what they add to that: both are linear in the inputs."""
        inputs, weight, mean, variance, count = ctx.saved_tensors
        of_inputs, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, inputs, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.counts:  # the statistics do not hang on what does not count
            of_unit, of_sum = ctx.ranks.total(torch.stack((of_weight, of_bias)).float()) / count
            scale = (variance + ctx.eps).rsqrt()
            factor = scale if weight is None else scale * weight
            slope = factor * scale * of_unit
            shift = factor * of_sum - slope * mean
            shape = (1, -1, *[1] * (inputs.ndim - 2))
            slope, shift = (each.to(inputs.dtype).view(shape) for each in (slope, shift))
            of_inputs = torch.addcmul(of_inputs - shift, inputs, slope, value=-1)
        else:
            ctx.ranks.total(torch.stack((of_weight, of_bias)).float())
            of_inputs = torch.zeros_like(inputs)
        if weight is None:
            return of_inputs, None, None, None, None, None
        return of_inputs, of_weight, of_bias, None, None, None
