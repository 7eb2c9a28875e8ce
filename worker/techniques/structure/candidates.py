"""Layers that may become products, what each costs as it is, and what it may become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from app.contract.factorizing import Factorize
from worker.constraints import owners, stored
from worker.loading.architecture import ArchitecturePlan
from worker.model import Model
from worker.structure.calls import called_layers, example_on
from worker.structure.forms import Factors, Form, Places, factored, is_pointwise, is_spatial, shape_of
from worker.techniques.pruning.weights import PrunableWeight, select


@dataclass(frozen=True)
class Candidate:
    """A layer that may become a product of a form. `calls` are the places that it takes and gives, each time that it
    computes for one sample."""

    weight: PrunableWeight
    form: Form
    calls: list[tuple[Places, Places]] = field(default_factory=list)

    @property
    def layer(self) -> nn.Module:
        return self.weight.owner

    @property
    def name(self) -> str:
        return self.weight.layer

    @property
    def parameters(self) -> int:
        """Weights, without biases."""
        return self.weight.value().numel()

    @property
    def macs(self) -> int:
        return sum(self.parameters * prod(made) for _, made in self.calls)

    def macs_of(self, factors: Factors) -> int:
        return sum(factors.macs(self.layer, given, made) for given, made in self.calls)

    def saves(self, factors: Factors) -> bool:
        """Whether the product has fewer parameters, and does no more work."""
        return factors.parameters(self.layer) < self.parameters and self.macs_of(factors) <= self.macs


def candidates(step: Factorize, model: Model) -> list[Candidate]:
    """In the network's order: layers that a pass calls, whose weight is theirs alone, and that a product can stand for.

    Raises InvalidSpec for a pattern that matches no layer.
    """
    found = [
        Candidate(weight, form)
        for weight in select(model.module, step.exclude)
        if (form := _form(step, weight.owner)) is not None and _is_alone(model, weight)
    ]
    called = called_layers(model, [one.layer for one in found])
    found = _standing(model, [one for one in found if one.layer in called])
    _measure(model, found)
    return found


def _form(step: Factorize, layer: nn.Module) -> Form | None:
    if is_pointwise(layer):
        return "svd" if step.method in ("auto", "svd") else None
    if not is_spatial(layer) or step.method == "svd":
        return None
    return "cp" if step.method == "cp" else "tucker"


def _is_alone(model: Model, weight: PrunableWeight) -> bool:
    """Whether no other layer has the weight, and, of an architecture, whether the layer is one of its own: there are no
    words for a product inside a TransformerEncoderLayer."""
    parent = model.module.get_submodule(weight.layer.rpartition(".")[0])
    if isinstance(model.plan, ArchitecturePlan) and not isinstance(parent, nn.Sequential):
        return False
    named = [name for name, own in model.module.named_modules(remove_duplicate=False) if own is weight.owner]
    return len(named) == 1 and len(list(owners(model.module, stored(weight.owner, weight.attribute)))) == 1


def _standing(model: Model, found: list[Candidate]) -> list[Candidate]:
    """Without those whose network looks at more of them than what they give: some read a layer's weight for its dtype.

    One of each kind of place, a class and a name in it, is tried.
    """
    stands: dict[tuple[type, str], bool] = {}
    for one in found:
        kind = _kind(model, one)
        if kind not in stands:
            stands[kind] = _runs_without(model, one)
    return [one for one in found if stands[_kind(model, one)]]


def _kind(model: Model, one: Candidate) -> tuple[type, str]:
    parent, _, attribute = one.name.rpartition(".")
    return type(model.module.get_submodule(parent)), attribute


def _runs_without(model: Model, one: Candidate) -> bool:
    ranks = (1, 1) if one.form == "tucker" else (1,)
    model.module.set_submodule(one.name, factored(one.layer, Factors(one.form, ranks)))
    try:
        with torch.no_grad():
            model.module.eval()(*example_on(model.module, model, 1))
    except Exception:  # models raise errors of every class
        return False
    finally:
        model.module.set_submodule(one.name, one.layer)
    return True


def _measure(model: Model, found: Sequence[Candidate]) -> None:
    """The places of each layer, of one sample."""
    with _seeing(found), torch.no_grad():
        model.module.eval()(*example_on(model.module, model, 1))


@contextmanager
def _seeing(found: Sequence[Candidate]) -> Iterator[None]:
    def hook(own: Candidate) -> Any:
        def see(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            axes = len(shape_of(own.layer)[2])
            own.calls.append((_places(given[0], axes), _places(output, axes)))

        return see

    hooks = [one.layer.register_forward_hook(hook(one)) for one in found]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _places(tensor: torch.Tensor, axes: int) -> Places:
    """Of a batch of one: along each axis of a convolution, or all rows of a linear layer."""
    return tuple(tensor.shape[-axes:]) if axes else (prod(tensor.shape[:-1]),)
