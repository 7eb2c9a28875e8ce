"""Weights in fewer bits of floating point: rounded to the nearest value of a narrower type, by no data.

bfloat16 and float16 are for all that is floating point, and are what artifacts store. float8 is for the weights of
products, with a scale for each output, and the module holds what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from app.contract.cast import Cast
from worker.constraints import baked, codebook_of, stored
from worker.context import Context
from worker.loading.program_module import Holder
from worker.model import Model, WeightHolder
from worker.techniques.base import Details
from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d, prunable, select
from worker.techniques.quantization.float8_math import nearest, row_scales
from worker.techniques.quantization.weight_only import Row, sqnr

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTE_AS_STORED = ("onnx", "pt2")  # uploads that compute in the types of their weights, if not told otherwise
NOT_FINITE, TOO_LARGE, SHARED = "not finite", "beyond the range of the type", "has a codebook"


def applies(step: Cast, model: Model) -> str | None:
    """None, or why no weight of the model would be cast. Raises InvalidSpec for patterns that match nothing."""
    if step.dtype in HALVES:
        if model.facts.format in COMPUTE_AS_STORED and {torch.float16, torch.bfloat16} & set(model.stored.values()):
            return "The upload stores weights in 16 bits already."
        names = dict(_floats(model.module.state_dict()))
        return None if any(not _excluded(name, step) for name in names) else "exclude leaves no weight to cast."
    if not any(_is_product(weight) for weight in prunable(model.module)):
        return "float8 is for the weights of Linear layers, convolutions and attention; there are none."
    return None if _chosen(step, model.module) else "exclude leaves no weight to cast."


def cast_weights(step: Cast, context: Context) -> Details:
    """Notes what is stored in halves, or rounds weights to float8 times scales.

    What is pruned stays zero; what the type cannot hold stays as it is, and is listed."""
    found: Details = {"method": step.method, "dtype": step.dtype, "bits": step.bits}
    return found | (_to_halves(step, context) if step.dtype in HALVES else _to_float8(step, context))


def _to_halves(step: Cast, context: Context) -> Details:
    dtype = HALVES[step.dtype]
    casts: dict[str, torch.dtype] = {}
    rows: list[Row] = []
    left: list[Row] = []
    seen: set[int] = set()
    for name, tensor in _floats(baked(context.model.module).state_dict()):
        why = "excluded" if _excluded(name, step) else _unfit(tensor, tensor.to(dtype))
        if why is None:
            casts[name] = dtype
        if tensor.data_ptr() in seen or tensor.numel() == 0:  # another name of a weight that layers share
            continue
        seen.add(tensor.data_ptr())
        if why is not None:
            left.append(_left(name, tensor, why))
        elif tensor.ndim > 1:
            rows.append(_row(step, name, tensor, tensor.to(dtype).float()))
    context.model = replace(context.model, casts=casts)
    return {"layers": rows, "layers_left_in_float": left, "tensors_cast": len(casts)}


def _to_float8(step: Cast, context: Context) -> Details:
    module = context.model.module
    chosen = {weight.name for weight in _chosen(step, module)}
    rows: list[Row] = []
    left: list[Row] = []
    for weight in prunable(module):
        before = weight.value().cpu().clone()
        why: str | None = "excluded" if _is_product(weight) else "no weight of a product"
        if weight.name in chosen:
            why = _round(weight, context)
        if why is None:
            rows.append(_row(step, weight.name, before, weight.value().cpu()))
        else:
            left.append(_left(weight.name, before, why))
    return {"layers": rows, "layers_left_in_float": left}


def _round(weight: PrunableWeight, context: Context) -> str | None:
    """Moves a weight to float8 times a scale for each output; None, or why it stays as it is."""
    if codebook_of(weight.owner, weight.attribute) is not None:
        return SHARED
    dtype = context.model.stored.get(weight.name, torch.float32)
    turned = weight.by_output(weight.value())
    rows = turned.flatten(1).float()
    scales = row_scales(rows, dtype)
    found = nearest(rows, scales, dtype)
    if (why := _unfit(rows, found)) is not None:
        return why
    context.scales[weight.name] = weight.by_output(scales.reshape(-1, *[1] * (turned.ndim - 1))).cpu()
    with torch.no_grad():
        parameter = stored(weight.owner, weight.attribute)
        parameter.copy_(weight.by_output(found.reshape(turned.shape)).to(parameter.dtype))
    return None


def _chosen(step: Cast, module: nn.Module) -> list[PrunableWeight]:
    return [weight for weight in select(module, step.exclude) if _is_product(weight)]


def _is_product(weight: PrunableWeight) -> bool:
    """Whether a layer multiplies its input by the weight, which is no table and no part of a recurrence."""
    owner = weight.owner
    if isinstance(owner, WeightHolder):
        return owner.kind.startswith(("Linear", "Conv"))
    return isinstance(owner, nn.Linear | _ConvNd | nn.MultiheadAttention | Holder) or is_transformers_conv1d(owner)


def _floats(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in state.items() if tensor.is_floating_point())


def _excluded(name: str, step: Cast) -> bool:
    """Whether a pattern is for a tensor or for its layer."""
    return any(fnmatchcase(own, pattern) for own in (name, name.rpartition(".")[0]) for pattern in step.exclude)


def _unfit(before: Tensor, after: Tensor) -> str | None:
    if bool(after.isfinite().all()):
        return None
    return TOO_LARGE if bool(before.isfinite().all()) else NOT_FINITE


def _row(step: Cast, name: str, before: Tensor, after: Tensor) -> Row:
    return {"name": name, "weights": before.numel(), "bits": step.bits, "sqnr_db": sqnr(before, after)}


def _left(name: str, tensor: Tensor, why: str) -> Row:
    return {"name": name, "weights": tensor.numel(), "why": why}
