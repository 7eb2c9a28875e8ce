"""Operators that make less of a dimension, or look at an order along it."""

from __future__ import annotations

from typing import Any

from worker.structure.tracing.movement import listed
from worker.structure.tracing.tracer import Tracer, unknown

REDUCING = (
    "mean", "sum", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
    "logsumexp", "any", "all", "nansum",
)  # fmt: skip
ALONG = (
    "max", "min", "argmax", "argmin", "cumsum", "cumprod", "sort", "topk", "median", "mode", "logcumsumexp",
)  # fmt: skip


def reducing(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Over some dimensions, or all: what channels are left, behind a dimension of channels none."""
    labels = tracer.labels(args[0])
    if labels is None:
        return
    asked = tracer.given.get("dim")
    dims = [asked] if isinstance(asked, int) else list(asked or range(labels.ndim))
    over = {dim % labels.ndim for dim in dims}
    varying = tracer.layout.varying(labels)
    if len(varying) > 1 and over & set(varying):
        tracer.layout.keep_outermost(labels)
        varying = tracer.layout.varying(labels)
    for one in listed(out):
        if over & set(varying):
            tracer.give(one, None)
            continue
        kept = labels
        for dim in sorted(over, reverse=True):
            kept = kept.narrow(dim, 0, 1) if one.ndim == labels.ndim else kept.select(dim, 0)
        tracer.give(one, kept if kept.shape == one.shape else None)


def along(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What looks at an order along a dimension, which has to stay."""
    labels = tracer.labels(args[0])
    dim = tracer.given.get("dim")
    if labels is None or dim is None or dim % labels.ndim in tracer.layout.varying(labels):
        unknown(tracer, args, kwargs, out)
        return
    for one in listed(out):
        if one.shape == labels.shape:
            tracer.give(one, labels)
        elif one.ndim == labels.ndim:
            tracer.give(one, labels.narrow(dim, 0, 1).expand(one.shape))
        else:
            tracer.give(one, labels.select(dim, 0))
