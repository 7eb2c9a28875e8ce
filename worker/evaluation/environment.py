"""Where a job ran: what a reader of the report needs to run it again."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from app.contract.report import Environment

LIBRARIES = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "numpy", "safetensors")


def environment(device: str, threads: int) -> Environment:
    """Versions, processor, threads and training device."""
    return Environment(
        tersor=metadata.version("tersor"),
        python=platform.python_version(),
        libraries={name: metadata.version(name) for name in LIBRARIES},
        cpu=cpu_name(),
        threads=threads,
        device=device,
    )


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the machine type."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
