"""How static quantization finds what 8 bits are spread over."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.contract.strict import Strict


class Calibration(Strict):
    """How the range of an activation is found from calibration samples."""

    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = Field(
        "auto",
        description="auto: that of minmax, percentile and mse with which the model's outputs for the samples change "
        "least. minmax: all that was seen. percentile: all but the outermost. entropy: the least Kullback-Leibler "
        "divergence (Migacz 2017). mse: the least squared error.",
    )
    percentile: Annotated[float, Field(gt=50, le=100, description="Of the values, that the range holds.")] = 99.999
    samples: Annotated[int, Field(ge=1, le=65_536)] = 256
