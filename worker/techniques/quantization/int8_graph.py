"""What an int8 ONNX file is and was made of, for those who deliver it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from app.contract.report import Details


@dataclass(frozen=True)
class Int8Graph:
    """`path` is the int8 file, `reference` the float file with the same weights, `floats` the one whose weights the
    integers stand for; `details` say what data decided."""

    path: Path
    reference: Path
    floats: Path
    details: Details = field(default_factory=dict)
