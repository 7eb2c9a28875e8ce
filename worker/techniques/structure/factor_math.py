"""Low-rank forms of matrices and kernels, and what each leaves out. Pure functions on float32 tensors.

A metric says which errors count: `left` D [outputs] and `right` S [inputs, inputs] stand for the squared error of
D W S, so that with S S^T the second moments of the inputs it is that of the layer's outputs. Factors are those of
D W S with D and S taken off again, which is the optimum of a matrix under such a metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4  # of the mean of the diagonal, so that inputs that never vary do not make a metric singular
SWEEPS = 200  # of alternating least squares, at most
_SHORT = 1e-30  # a length that is taken for none
CLOSE = 1e-6  # change of the error, over the energy, at which they have converged


@dataclass(frozen=True)
class Metric:
    """D [outputs], positive, S [inputs, inputs] and its inverse."""

    left: Tensor
    right: Tensor
    right_inverse: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """D W S, for W [outputs, inputs, …]."""
        scaled = self.left.view(-1, *[1] * (weight.ndim - 1)) * weight
        return torch.einsum("oi...,ij->oj...", scaled, self.right)


def plain(weight: Tensor) -> Metric:
    """All errors count alike."""
    eye = torch.eye(weight.shape[1])
    return Metric(torch.ones(len(weight)), eye, eye)


def by_inputs(weight: Tensor, moments: Tensor) -> Metric:
    """Errors of outputs, for inputs with the second moments [inputs, inputs], of whatever scale: S is their root, by
    their eigenvectors. Of inputs that are all zero nothing is known, and all errors count alike."""
    size = moments.diagonal().double().mean()
    if not size > 0:
        return plain(weight)
    values, vectors = torch.linalg.eigh(moments.double() / size)
    root = (values.clamp(min=0) + RIDGE).sqrt()
    right, inverse = vectors * root, (vectors / root).T
    return Metric(torch.ones(len(weight)), right.float(), inverse.float())


def by_outputs(weight: Tensor, information: Tensor) -> Metric:
    """Errors of outputs [outputs] by how much each matters."""
    scale = information.double()
    scale = (scale / scale.mean().clamp(min=torch.finfo(torch.float64).tiny) + RIDGE).sqrt().float()
    eye = torch.eye(weight.shape[1])
    return Metric(scale, eye, eye)


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a matrix under a metric."""

    left: Tensor
    values: Tensor
    right: Tensor
    metric: Metric

    def tails(self) -> Tensor:
        """What the best matrix of each rank, 0 to all, leaves out: squared errors [ranks + 1] (Eckart & Young 1936)."""
        energies = self.values.square()
        return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B [outputs, rank] and A [rank, inputs], whose product is the best of its rank under the metric."""
        b = self.left[:, :rank] * self.values[:rank] / self.metric.left[:, None].double()
        a = self.right[:rank] @ self.metric.right_inverse.double()
        b, a = balanced([b, a.T])
        return b.float(), a.T.float()


def spectrum(weight: Tensor, metric: Metric) -> Spectrum:
    """Of a weight [outputs, inputs]."""
    left, values, right = torch.linalg.svd(metric.of(weight).double(), full_matrices=False)
    return Spectrum(left, values, right, metric)


@dataclass(frozen=True)
class Modes:
    """Of a kernel [outputs, inputs, …] under a metric: a basis of each side, columns by falling energy."""

    kernel: Tensor
    outputs: Tensor
    inputs: Tensor

    def left_out(self) -> Tensor:
        """[outputs + 1, inputs + 1]: the squared error of the projection on so many first vectors of both bases."""
        core = torch.einsum("oi...,or,is->rs...", self.kernel, self.outputs, self.inputs)
        energies = core.square().reshape(*core.shape[:2], -1).sum(2)
        kept = torch.zeros(core.shape[0] + 1, core.shape[1] + 1, dtype=core.dtype)
        kept[1:, 1:] = energies.cumsum(0).cumsum(1)
        return (kept[-1, -1] - kept).clamp(min=0)


def modes(kernel: Tensor, metric: Metric) -> Modes:
    """The higher-order singular value decomposition of both channel modes (De Lathauwer, De Moor & Vandewalle 2000)."""
    own = metric.of(kernel).double()
    return Modes(own, _basis(own.flatten(1)), _basis(own.transpose(0, 1).flatten(1)))


def tucker(modes: Modes, metric: Metric, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Out [outputs of the layer, outputs], core [outputs, inputs, …] and into [inputs, inputs of the layer]: Tucker-2
    (Kim et al. 2016), by one pass of orthogonal iteration behind the decomposition of each mode alone."""
    given = torch.einsum("oi...,is->os...", modes.kernel, modes.inputs[:, :inputs])
    out = _basis(given.flatten(1))[:, :outputs]
    taken = torch.einsum("oi...,or->ri...", modes.kernel, out)
    into = _basis(taken.transpose(0, 1).flatten(1))[:, :inputs]
    core = torch.einsum("ri...,is->rs...", taken, into)
    out, into = out / metric.left[:, None].double(), into.T @ metric.right_inverse.double()
    lengths, widths = out.norm(dim=0).clamp(min=_SHORT), into.norm(dim=1).clamp(min=_SHORT)
    core = core * lengths.view(-1, *[1] * (core.ndim - 1)) * widths.view(1, -1, *[1] * (core.ndim - 2))
    return (out / lengths).float(), core.float(), (into / widths[:, None]).float()


def cp(kernel: Tensor, metric: Metric, rank: int, seed: int) -> tuple[list[Tensor], float]:
    """A matrix [size, rank] for each mode of a kernel [outputs, inputs, …], whose products summed over the rank come
    near to it (canonical polyadic decomposition by alternating least squares: Carroll & Chang 1970; Harshman 1970), and
    the squared error under the metric."""
    own = metric.of(kernel).double()
    generator = torch.Generator().manual_seed(seed)
    factors = [_start(own.movedim(mode, 0).flatten(1), rank, generator) for mode in range(own.ndim)]
    energy = float(own.square().sum())
    error, before = energy, float("inf")
    for _ in range(SWEEPS):
        for mode in range(own.ndim):
            factors[mode] = _improved(own, factors, mode)
        error = _error(own, energy, factors)
        if before - error < CLOSE * energy:
            break
        before = error
    factors[0] = factors[0] / metric.left[:, None].double()
    factors[1] = (factors[1].T @ metric.right_inverse.double()).T
    return [factor.float() for factor in balanced(factors)], error


def _start(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first vectors of a mode's basis; where there are too few, noise besides."""
    basis = _basis(rows)
    more = torch.randn(len(rows), max(0, rank - basis.shape[1]), generator=generator, dtype=rows.dtype)
    return torch.cat([basis[:, :rank], more / max(1, len(rows)) ** 0.5], 1)


def _improved(own: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The least squares of one mode, the others being what they are."""
    others = [factor for place, factor in enumerate(factors) if place != mode]
    gram = _gram(others)
    gram = gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, (own.movedim(mode, 0).flatten(1) @ _columns(others)).T).T


def _error(own: Tensor, energy: float, factors: list[Tensor]) -> float:
    """The squared error, without the tensor that the factors stand for."""
    along = (own.flatten(1) @ _columns(factors[1:]) * factors[0]).sum()
    return max(0.0, energy - 2 * float(along) + float(_gram(factors).sum()))


def _gram(factors: list[Tensor]) -> Tensor:
    """[rank, rank]: the products of the columns of the tensors that the factors stand for."""
    return torch.stack([factor.T @ factor for factor in factors]).prod(0)


def _columns(factors: list[Tensor]) -> Tensor:
    """The Khatri-Rao product [product of sizes, rank]."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, None] * factor[None]).flatten(0, 1)
    return found


def product(factors: list[Tensor]) -> Tensor:
    """The tensor that the matrices [size, rank] of its modes stand for."""
    sizes = [len(factor) for factor in factors]
    return (factors[0] @ _columns(factors[1:]).T).reshape(sizes)


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """Of equal length in every mode, which trains best."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp(min=_SHORT)
    length = norms.log().mean(0).exp()
    return [factor / norm * length for factor, norm in zip(factors, norms, strict=True)]


def _basis(rows: Tensor) -> Tensor:
    """All left singular vectors [n, n] of [n, columns], by falling singular values."""
    return torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)
