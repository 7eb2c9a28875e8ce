"""How long layers and the products that they may become take on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.context import Context
from worker.structure.calls import example_on
from worker.structure.forms import factored, shape_of
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.latencies import RUNS, layer_shares
from worker.techniques.structure.ranking import Option, looked_at


def seconds(
    context: Context, layers: Sequence[Candidate], options: Sequence[Sequence[Option]], whole: float
) -> list[list[float]]:
    """Of each layer as it is, and then of its options, of a network that takes so many seconds as a `whole`.

    A layer has its share of the whole; a product has of that what it takes in torch, beside the layer, for the same
    input.
    """
    shares, inputs = layer_shares(context), _inputs(context, layers)
    known: dict[Any, list[float]] = {}
    found = []
    for one, own in zip(layers, options, strict=True):
        key = shape_of(one.layer), one.form, tuple(one.calls), len(own)
        if key not in known:
            known[key] = _beside(one, own, inputs[one.name])
        taken = whole * shares.get(one.name, 0.0)
        found.append([taken, *(taken * share for share in known[key])])
    return found


def _beside(one: Candidate, options: Sequence[Option], given: Tensor) -> list[float]:
    """Of each option its time as a share of the layer's: of a few, and between them by their work."""
    if not options:
        return []
    places = looked_at(options)
    usual = _taken(one.layer, given)
    work = [one.macs_of(option.factors) for option in options]
    told = sorted((work[place], _taken(_made(one, options[place]), given) / usual) for place in places)
    at, shares = [own for own, _ in told], [share for _, share in told]
    return [float(share) for share in np.interp(work, at, shares)]


def _made(one: Candidate, option: Option) -> nn.Module:
    made = factored(one.layer, option.factors).eval()
    plain(made)
    return made


def plain(module: nn.Module) -> None:
    """Gives a module weights to be timed with: what new ones hold may be numbers that a processor is slow with."""
    for own in module.parameters():
        nn.init.constant_(own, 0.01)


def _taken(layer: nn.Module, given: Tensor) -> float:
    """The median of a few runs, in seconds."""
    taken = []
    with torch.no_grad():
        layer(given)
        for _ in range(RUNS):
            start = time.perf_counter()
            layer(given)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _inputs(context: Context, layers: Sequence[Candidate]) -> dict[str, Tensor]:
    """What comes into each layer for one sample."""
    module, found = context.model.module.eval(), dict[str, Tensor]()

    def see(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.setdefault(name, given[0].detach().clone())

        return hook

    hooks = [one.layer.register_forward_pre_hook(see(one.name)) for one in layers]
    try:
        with torch.no_grad():
            module(*example_on(module, context.model, 1))
    finally:
        for own in hooks:
            own.remove()
    return found
