"""The quantize step with method auto: a wish, for which `app.contract.choosing` finds a step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.contract.pruning import Pattern
from app.contract.strict import Strict


class Automatic(Strict):
    """Quantizes by the method, and with the settings, that fit the model's layers, the data and the target.

    Which ones, and why, is in the report's details of the step.
    """

    technique: Literal["quantize"] = "quantize"
    method: Literal["auto"] = "auto"
    target: Literal["x86", "arm", "cuda", "vllm"] = Field(
        "x86", description="Where the artifact will run: a processor, a GPU of NVIDIA, or vLLM."
    )
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
