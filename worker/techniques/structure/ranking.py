"""What a layer loses at each rank, and the factors of the ranks that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worker.structure.forms import Factors, kernel_of, shape_of
from worker.techniques.structure import factor_math
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.factor_math import Metric

RANKS = 64  # that are looked at of a matrix
SIDE = 24  # of each side of a kernel, in pairs
CP_RANKS = 10  # each is a decomposition of its own
MEASURED = 4  # options of a layer that are measured


@dataclass(frozen=True)
class Option:
    """A product in place of a layer, and the share of the layer's energy that it leaves out."""

    factors: Factors
    left_out: float


def looked_at(options: Sequence[Option]) -> list[int]:
    """The places of a few, from the first to the last, where each costs a measurement: the others lie between."""
    return sorted({round(place) for place in np.linspace(0, len(options) - 1, min(MEASURED, len(options)))})


class Ranking(Protocol):
    """Of one layer: what it may become, from the least to the most, and what fills that."""

    def options(self) -> list[Option]: ...

    def weights(self, factors: Factors) -> list[Tensor]:
        """Of each module of the product, that which sees the input first."""

    def product(self, factors: Factors) -> Tensor:
        """[outputs, inputs, …]: the weight that the product stands for."""


def ranking(one: Candidate, metric: Metric, seed: int) -> Ranking:
    """By the candidate's form."""
    match one.form:
        case "svd":
            return _Matrix(one, metric)
        case "tucker":
            return _Kernel(one, metric)
        case "cp":
            return _Polyadic(one, metric, seed)


class _Matrix:
    def __init__(self, one: Candidate, metric: Metric) -> None:
        self._one = one
        outputs, inputs, _ = shape_of(one.layer)
        self._spectrum = factor_math.spectrum(kernel_of(one.layer).reshape(outputs, inputs), metric)

    def options(self) -> list[Option]:
        tails = self._spectrum.tails()
        most = len(tails) - 1
        found = [Option(Factors("svd", (rank,)), _share(tails[rank], tails[0])) for rank in _ranks(most, RANKS)]
        return [option for option in found if self._one.saves(option.factors)]

    def weights(self, factors: Factors) -> list[Tensor]:
        b, a = self._spectrum.factors(factors.ranks[0])
        return [a, b]

    def product(self, factors: Factors) -> Tensor:
        a, b = self.weights(factors)
        return (b @ a).reshape(kernel_of(self._one.layer).shape)


class _Kernel:
    def __init__(self, one: Candidate, metric: Metric) -> None:
        self._one, self._metric = one, metric
        self._modes = factor_math.modes(kernel_of(one.layer), metric)

    def options(self) -> list[Option]:
        """Pairs of ranks that none with fewer parameters is better than."""
        left_out = self._modes.left_out()
        outputs, inputs = (_ranks(size, SIDE) for size in self._modes.kernel.shape[:2])
        every = [
            Option(Factors("tucker", (out, into)), _share(left_out[out, into], left_out[0, 0]))
            for out in outputs
            for into in inputs
        ]
        every.sort(key=lambda option: (option.factors.parameters(self._one.layer), option.left_out))
        found: list[Option] = []
        for option in every:
            if self._one.saves(option.factors) and (not found or option.left_out < found[-1].left_out):
                found.append(option)
        return found

    def weights(self, factors: Factors) -> list[Tensor]:
        out, core, into = factor_math.tucker(self._modes, self._metric, *factors.ranks)
        return [into, core, out]

    def product(self, factors: Factors) -> Tensor:
        into, core, out = self.weights(factors)
        return torch.einsum("or,rs...,si->oi...", out, core, into)


class _Polyadic:
    def __init__(self, one: Candidate, metric: Metric, seed: int) -> None:
        self._one, self._metric, self._seed = one, metric, seed
        self._found: dict[int, tuple[list[Tensor], float]] = {}

    def options(self) -> list[Option]:
        kernel = kernel_of(self._one.layer)
        most = max(1, kernel.numel() // sum(kernel.shape))
        energy = float(self._metric.of(kernel).double().square().sum())
        saving = [rank for rank in _ranks(most, CP_RANKS) if self._one.saves(Factors("cp", (rank,)))]
        return [Option(Factors("cp", (rank,)), self._at(rank)[1] / max(energy, 1e-30)) for rank in saving]

    def weights(self, factors: Factors) -> list[Tensor]:
        out, into, *along = self._at(factors.ranks[0])[0]
        return [into.T, *(one.T for one in along), out]

    def product(self, factors: Factors) -> Tensor:
        return factor_math.product(self._at(factors.ranks[0])[0])

    def _at(self, rank: int) -> tuple[list[Tensor], float]:
        if rank not in self._found:
            self._found[rank] = factor_math.cp(kernel_of(self._one.layer), self._metric, rank, self._seed)
        return self._found[rank]


def _ranks(most: int, count: int) -> list[int]:
    """So many at most, from 1 on, each larger by the same factor."""
    return sorted({round(rank) for rank in np.geomspace(1, most, min(count, most))})


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) else 0.0
