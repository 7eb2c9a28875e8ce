"""How long layers and the products that they may become take on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from worker.context import Context
from worker.structure.forms import factored
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.operators import Clock, Shape, shapes_given
from worker.techniques.structure.ranking import Option, looked_at


def seconds(
    context: Context, layers: Sequence[Candidate], options: Sequence[Sequence[Option]], whole: float
) -> list[list[float]]:
    """Of each layer as it is, and then of its options, in a network that takes so many seconds as a `whole`: a few of
    them as operators of ONNX Runtime, and between those by their work."""
    clock, given = Clock(torch.get_num_threads()), shapes_given(context, {one.name: one.layer for one in layers})
    found = [_table(clock, one, own, given[one.name]) for one, own in zip(layers, options, strict=True)]
    told = sum(own[0] for own in found)
    # By itself a layer may take longer than in the network, where its inputs lie as it likes them.
    return [[min(1.0, whole / told) * one for one in own] for own in found] if told else found


def _table(clock: Clock, one: Candidate, options: Sequence[Option], given: Sequence[Shape]) -> list[float]:
    taken = [_of(clock, [one.layer], given)]
    if options:
        work = [one.macs_of(option.factors) for option in options]
        told = sorted((work[place], _of(clock, _made(one, options[place]), given)) for place in looked_at(options))
        at, measured = [own for own, _ in told], [own for _, own in told]
        taken += np.interp(work, at, measured).tolist()
    return taken


def _of(clock: Clock, chain: Sequence[nn.Module], given: Sequence[Shape]) -> float:
    return sum(clock.seconds(chain, shape) for shape in given)


def _made(one: Candidate, option: Option) -> list[nn.Module]:
    return list(factored(one.layer, option.factors))
