"""Weights in fewer bits of floating point: rounded to the nearest value of a narrower type, by no data.

bfloat16 and float16 are for all that is floating point, and are what artifacts store. float8 is for the weights of
products, with a scale for each output, and the module holds what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from app.contract.cast import Cast
from app.contract.errors import InvalidSpec
from worker.constraints import baked, codebook_of, owners, stored
from worker.context import Context
from worker.loading.program_module import Holder
from worker.model import Model, WeightHolder
from worker.techniques.base import Details
from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d, listed, prunable, select
from worker.techniques.quantization.float8_math import nearest, row_scales
from worker.techniques.quantization.weight_only import Row, sqnr

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTE_AS_STORED = ("onnx", "pt2")  # uploads that compute in the types of their weights, if not told otherwise
NOT_FINITE, TOO_LARGE, CODEBOOK = "not finite", "beyond the range of the type", "has a codebook"
SHARED, NO_PRODUCT = "shared with an embedding", "no weight of a product"


def applies(step: Cast, model: Model) -> str | None:
    """None, or why no weight of the model would be cast. Raises InvalidSpec for patterns that match nothing."""
    if step.dtype in HALVES:
        if model.facts.format in COMPUTE_AS_STORED and {torch.float16, torch.bfloat16} & set(model.stored.values()):
            return "The upload stores weights in 16 bits already."
        names = [name for name, _ in _floats(model.module.state_dict())]
        _check_patterns(step, names)
        return None if any(not _excluded(name, step) for name in names) else "exclude leaves no weight to cast."
    if not any(_is_product(weight.owner) for weight in prunable(model.module)):
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
    tensors = dict(_floats(baked(context.model.module).state_dict()))
    # One that layers share is excluded by any of its names: it is stored once.
    excluded = {tensor.data_ptr() for name, tensor in tensors.items() if tensor.numel() and _excluded(name, step)}
    for name, tensor in tensors.items():
        why = "excluded" if tensor.data_ptr() in excluded else _unfit(tensor, tensor.to(dtype))
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
        why = _round(weight, context) if weight.name in chosen else _not_chosen(module, weight)
        if why is None:
            rows.append(_row(step, weight.name, before, weight.value().cpu()))
        else:
            left.append(_left(weight.name, before, why))
    return {"layers": rows, "layers_left_in_float": left}


def _round(weight: PrunableWeight, context: Context) -> str | None:
    """Moves a weight to float8 times a scale for each output; None, or why it stays as it is."""
    if codebook_of(weight.owner, weight.attribute) is not None:
        return CODEBOOK
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
    return [weight for weight in select(module, step.exclude) if _is_product(weight.owner)]


def _not_chosen(module: nn.Module, weight: PrunableWeight) -> str:
    """Why a weight is none of those that become float8."""
    if _is_product(weight.owner):
        return "excluded"
    sharing = owners(module, stored(weight.owner, weight.attribute))
    return SHARED if any(_is_product(layer) for _, layer, _ in sharing) else NO_PRODUCT


def _is_product(owner: nn.Module) -> bool:
    """Whether a layer multiplies its input by its weight, which is no table and no part of a recurrence."""
    if isinstance(owner, WeightHolder):
        return owner.kind.startswith(("Linear", "Conv"))
    return isinstance(owner, nn.Linear | _ConvNd | nn.MultiheadAttention | Holder) or is_transformers_conv1d(owner)


def _floats(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in state.items() if tensor.is_floating_point())


def _check_patterns(step: Cast, names: Sequence[str]) -> None:
    """Raises InvalidSpec for a pattern that excludes nothing, as the name of what only holds layers does."""
    for pattern in step.exclude:
        if not any(_matches(name, pattern) for name in names):
            layers = listed(name.rpartition(".")[0] or name for name in names)
            raise InvalidSpec(
                f"exclude: {pattern!r} matches no layer that has weights, and no weight. The layers are "
                f"{layers}; '{pattern}.*' is for all within one."
            )


def _excluded(name: str, step: Cast) -> bool:
    return any(_matches(name, pattern) for pattern in step.exclude)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is for a tensor or for its layer."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _unfit(before: Tensor, after: Tensor) -> str | None:
    if bool(after.isfinite().all()):
        return None
    return TOO_LARGE if bool(before.isfinite().all()) else NOT_FINITE


def _row(step: Cast, name: str, before: Tensor, after: Tensor) -> Row:
    return {"name": name, "weights": before.numel(), "bits": step.bits, "sqnr_db": sqnr(before, after)}


def _left(name: str, tensor: Tensor, why: str) -> Row:
    return {"name": name, "weights": tensor.numel(), "why": why}
