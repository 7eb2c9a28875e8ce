"""What a step leaves on a weight, so that every later step keeps it: masks and codebooks, as parametrizations of
`torch.nn.utils`; and, while it trains, the grid that it is rounded to.

Names are those of the plain state dict (`0.weight`, `encoder.layer.1.attention.self.query.weight`), whether a weight is
constrained or not. A weight that several layers share (tied) has one mask and is listed once, under its first name.

A network may come with parametrizations of its own, such as the weight normalization of speech encoders: its files have
the names of their parts, so they stay as they are, and nothing is imposed on a layer that has them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from worker.techniques.quantization.qat.lsq import FakeQuantized


class Mask(nn.Module):
    """Keeps the weights where `mask` (bool, of the weight's shape) is true; the others are exactly +0.0.

    A selection rather than a product: -w * 0 would be -0.0 and inf * 0 not a number. Its gradient is exactly zero where
    the mask is false, so neither a gradient nor, in the weights that the module computes with, weight decay or momentum
    can bring a pruned weight back.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool))
        self.watched = False
        self.gradient: Tensor | None = None
        """While `watched`: the sum of the gradients of the weight that the layer computes with. Unlike that of the
        parameter it is not zero where the mask is false."""

    def forward(self, weight: Tensor) -> Tensor:
        if self.mask.stride() != weight.stride():  # the selection would lie as the mask does
            self.mask = torch.empty_like(weight, dtype=torch.bool).copy_(self.mask)
        masked = torch.where(self.mask, weight, 0.0)
        if self.watched and masked.requires_grad:
            masked.register_hook(self._see)
        return masked

    def _see(self, gradient: Tensor) -> None:
        gradient = gradient.detach()
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient


class _Shared(torch.autograd.Function):
    """entries[codes], whose gradient sums what is said of each entry; `straight` hands it to the weight as well."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, entries: Tensor, codes: Tensor, straight: bool) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.count, ctx.straight = len(entries), straight
        return entries[codes.long()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        own = gradient.new_zeros(ctx.count)
        own.index_add_(0, codes.flatten().long(), gradient.flatten())
        return gradient if ctx.straight else None, own, None, None


class Shared(nn.Module):
    """Weights of a few values: element i is `entries[codes[i]]`, and entry 0 is zero for good.

    `entries` [n + 1] learn. `straight`: so do the weights behind them, as if they were what is computed with (the
    straight-through estimator: Bengio, Leonard & Courville 2013), for codes that are to be found again.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, entries: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32))
        self.entries = nn.Parameter(entries)
        self.straight = False

    def forward(self, weight: Tensor) -> Tensor:
        found: Tensor = _Shared.apply(weight, self.entries, self.codes, self.straight)
        return torch.where(self.codes > 0, found, 0.0)


def impose_codebook(module: nn.Module, name: str, codes: Tensor, entries: Tensor) -> Shared:
    """Makes the parameter `name` what `entries` [n] say: code 0 is zero, code k the entry k - 1.

    A second codebook on the same weight takes the place of the first. Raises as `impose_mask` does.
    """
    owner, attribute = _locate(module, name)
    weight = stored(owner, attribute)
    if codes.shape != weight.shape:
        raise ValueError(f"the codes of {name} have shape {tuple(codes.shape)}, the weight {tuple(weight.shape)}")
    entries = torch.cat([entries.new_zeros(1), entries.detach()]).to(weight)
    existing = codebook_of(owner, attribute)
    if existing is not None:
        existing.codes.copy_(codes)
        if existing.entries.shape == entries.shape:  # an optimizer may hold the parameter
            with torch.no_grad():
                existing.entries.copy_(entries)
        else:
            existing.entries = nn.Parameter(entries)
        return existing
    shared = Shared(codes.to(weight.device), entries)
    for _, layer, key in list(owners(module, weight)):
        parametrize.register_parametrization(layer, key, shared)
    return shared


def codebooks(module: nn.Module) -> dict[str, Shared]:
    """The codebook of every weight that has one, by the weight's name."""
    found: dict[str, Shared] = {}
    for prefix, layer in module.named_modules():
        for attribute in _parametrized(layer):
            own = codebook_of(layer, attribute)
            if own is not None and not any(own is other for other in found.values()):
                found[f"{prefix}.{attribute}".lstrip(".")] = own
    return found


def codebook_of(owner: nn.Module, attribute: str) -> Shared | None:
    """The codebook of a layer's weight."""
    if not parametrize.is_parametrized(owner, attribute):
        return None
    return next((entry for entry in _parametrizations(owner)[attribute] if isinstance(entry, Shared)), None)


def impose_rounding(module: nn.Module, name: str, rounding: FakeQuantized) -> None:
    """Rounds the parameter `name`, in every layer that shares it, behind whatever else is imposed on it."""
    owner, attribute = _locate(module, name)
    weight = stored(owner, attribute)
    for _, layer, key in list(owners(module, weight)):
        parametrize.register_parametrization(layer, key, rounding)


def release_roundings(module: nn.Module) -> None:
    """Takes all roundings off, in place: parameters are what was trained behind them."""
    for layer in list(module.modules()):
        attributes = _parametrized(layer)
        for attribute in attributes:
            entries = _parametrizations(layer)[attribute]
            if isinstance(entries[-1], FakeQuantized):
                del entries[-1]
        if attributes and not any(len(_parametrizations(layer)[attribute]) for attribute in attributes):
            _unparametrize(layer, {attribute: stored(layer, attribute) for attribute in attributes})


def impose_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Keeps the parameter `name` of `module` at zero wherever `mask` is false, in every layer that shares it.

    A second mask on the same weight is combined with the first by AND. Raises ValueError where the shapes differ and
    AttributeError where there is no such parameter.
    """
    owner, attribute = _locate(module, name)
    weight = stored(owner, attribute)
    if mask.shape != weight.shape:
        raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    mask = mask.to(device=weight.device, dtype=torch.bool)
    existing = _mask_of(owner, attribute)
    if existing is not None:
        existing.mask.logical_and_(mask)
        mask = existing.mask
    else:
        shared = Mask(mask.clone())
        for _, layer, key in list(owners(module, weight)):
            parametrize.register_parametrization(layer, key, shared)
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)
        if (shared_values := codebook_of(owner, attribute)) is not None:
            shared_values.codes.masked_fill_(~mask, 0)


def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Keeps the parameter `name` just where `mask` is true, whatever was kept before.

    Behind the mask the parameter keeps its values. Raises as `impose_mask` does.
    """
    owner, attribute = _locate(module, name)
    weight = stored(owner, attribute)
    if _mask_of(owner, attribute) is None:
        values = weight.detach().clone()
        impose_mask(module, name, mask)
        with torch.no_grad():
            weight.copy_(values)
    mask_of(owner, attribute).mask.copy_(mask)


def mask_of(owner: nn.Module, attribute: str) -> Mask:
    """The mask of a layer's weight. Raises AttributeError where it has none."""
    mask = _mask_of(owner, attribute)
    if mask is None:
        raise AttributeError(f"{type(owner).__name__}.{attribute} has no mask")
    return mask


def masks(module: nn.Module) -> dict[str, Tensor]:
    """The mask of every masked weight by the weight's name; bool, true where the weight is kept."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        for attribute in _parametrized(layer):
            mask = _mask_of(layer, attribute)
            if mask is not None and id(mask) not in seen:
                seen.add(id(mask))
                found[f"{prefix}.{attribute}".lstrip(".")] = mask.mask
    return found


def baked(module: nn.Module) -> nn.Module:
    """A copy in eval mode, free of constraints, whose weights are what those make of them.

    Its state dict has the plain names, and weights that were shared still are.
    """
    plain = copy.deepcopy(module, _without_views(module))
    values: dict[nn.Parameter, nn.Parameter] = {}
    for layer in list(plain.modules()):
        if _parametrized(layer):
            _bake(layer, values)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return plain.eval()


def bare(module: nn.Module) -> None:
    """Takes all constraints off, in place: parameters are what was trained behind them."""
    for layer in list(module.modules()):
        if _parametrized(layer):
            plain = {attribute: stored(layer, attribute) for attribute in _parametrized(layer)}
            _unparametrize(layer, plain)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()


def computed(layer: nn.Module) -> bool:
    """Whether a layer has weights that the network itself computes, by parametrizations that are no constraints."""
    if not parametrize.is_parametrized(layer):
        return False
    return not all(
        isinstance(entry, Mask | Shared | FakeQuantized)
        for entries in _parametrizations(layer).values()
        for entry in entries
    )


def stored(owner: nn.Module, attribute: str) -> nn.Parameter:
    """The trained parameter behind a weight of a layer: what an optimizer sees, before constraints.

    Raises AttributeError where the layer has no parameter of that name.
    """
    if attribute in _parametrized(owner):
        parameter = _parametrizations(owner)[attribute].original
    else:
        parameter = owner._parameters.get(attribute)
    if not isinstance(parameter, nn.Parameter):
        raise AttributeError(f"{type(owner).__name__} has no parameter {attribute!r}")
    return parameter


def owners(module: nn.Module, weight: nn.Parameter) -> Iterator[tuple[str, nn.Module, str]]:
    """Each layer, with its name, and attribute that holds this very parameter."""
    for name, layer in module.named_modules():
        if isinstance(layer, parametrize.ParametrizationList):
            continue
        for attribute, parameter in list(layer._parameters.items()):
            if parameter is weight:
                yield name, layer, attribute
        for attribute in _parametrized(layer):
            if stored(layer, attribute) is weight:
                yield name, layer, attribute


def _bake(layer: nn.Module, values: dict[nn.Parameter, nn.Parameter]) -> None:
    """Puts the constrained values in place of the parametrizations; `values` carries shared ones from layer to layer.

    `parametrize.remove_parametrizations` would not do on a copy: it takes the attribute off the class, which the copy
    has in common with the original, and leaves the original without its weight.
    """
    plain: dict[str, nn.Parameter] = {}
    for attribute in _parametrized(layer):
        parameter = stored(layer, attribute)
        if parameter not in values:
            value = getattr(layer, attribute).detach().clone()
            values[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        plain[attribute] = values[parameter]
    _unparametrize(layer, plain)


def _unparametrize(layer: nn.Module, plain: dict[str, nn.Parameter]) -> None:
    """Puts parameters in place of a layer's parametrizations."""
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    # First, where torch's own layers have them: the weight before its bias.
    layer._parameters = {**plain, **layer._parameters}


def _locate(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _parametrizations(layer: nn.Module) -> Any:
    return layer.parametrizations


def _parametrized(layer: nn.Module) -> list[str]:
    """The names of the weights under constraints."""
    return list(_parametrizations(layer)) if parametrize.is_parametrized(layer) and not computed(layer) else []


def _mask_of(layer: nn.Module, attribute: str) -> Mask | None:
    if not parametrize.is_parametrized(layer, attribute):
        return None
    return next((entry for entry in _parametrizations(layer)[attribute] if isinstance(entry, Mask)), None)


def _without_views(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy that leaves out what recurrent layers keep beside their parameters.

    They hold on to the masked weights of their last forward pass, which deepcopy refuses because a graph hangs on them;
    the copy makes its own.
    """
    views = [view for layer in module.modules() if isinstance(layer, nn.RNNBase) for view in layer._flat_weights]
    return {id(view): torch.empty(0) for view in views if view is not None and not isinstance(view, nn.Parameter)}
