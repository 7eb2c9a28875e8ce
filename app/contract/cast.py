"""The quantize step with method cast: weights in fewer bits of floating point."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.contract.pruning import Pattern
from app.contract.strict import Strict


class Cast(Strict):
    """Stores weights in a narrower floating-point type; artifacts compute in float32, as before."""

    technique: Literal["quantize"] = "quantize"
    method: Literal["cast"] = "cast"
    dtype: Literal["bfloat16", "float16", "float8_e4m3"] = Field(
        "bfloat16",
        description="bfloat16, float16: all that is floating point, norms and biases too. float8_e4m3: the weights of "
        "linear layers and convolutions, with a scale an output channel (Micikevicius et al. 2022).",
    )
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8 if self.dtype == "float8_e4m3" else 16
