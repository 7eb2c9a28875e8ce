"""The quantize step with method codebook: few values for many weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.contract.pruning import Pattern
from app.contract.strict import Strict
from app.contract.training import Training

MOST_ENTRIES = 256


class Codebook(Strict):
    """Weights share values: those of a layer become the nearest of a few entries (Han, Mao & Dally 2016)."""

    technique: Literal["quantize"] = "quantize"
    method: Literal["codebook"] = "codebook"
    entries: Annotated[
        int, Field(ge=2, le=MOST_ENTRIES, description="Values of a codebook; pruned weights are zero beside them.")
    ] = 16
    groups: Annotated[
        int, Field(ge=1, le=256, description="Codebooks of a layer, each for as many of its outputs; 1: one a layer.")
    ] = 1
    start: Literal["linear", "density", "kmeans++"] = Field(
        "linear",
        description="Where k-means begins: at even distances from the least weight to the greatest, at even shares of "
        "the weights, or at weights far from one another (Arthur & Vassilvitskii 2007).",
    )
    assignment: Literal["fixed", "reestimated"] = Field(
        "fixed",
        description="In the training that follows entries learn. fixed: each weight keeps its entry. reestimated: the "
        "weights behind them learn too, and move to whichever entry is nearest.",
    )
    entropy_weight: Annotated[
        float,
        Field(
            ge=0,
            le=10,
            description="By how much a weight may be farther from its entry, in variances of the layer's weights a "
            "bit, where that entry codes shorter (entropy-constrained quantization: Chou, Lookabaugh & Gray 1989).",
        ),
    ] = 0.0
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What entries, biases and norms are rounded to in the end; kept as float32."
    )
    biases: bool = Field(False, description="Whether the biases of the layers share values too, a codebook a layer.")
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
    training: Training | None = Field(None, description="Training of the entries, biases and norms.")
