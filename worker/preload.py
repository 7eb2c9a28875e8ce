"""Imported once by the fork server, so that every child starts with all of it in memory.

Nothing here may touch an accelerator, which does not survive a fork.
"""

from __future__ import annotations

import importlib

MODULES = (
    "worker.entries",
    "worker.inspect",
    "worker.run",
    # What an export to ONNX imports when it is first asked for: three seconds of every job.
    "torch.export._trace",
    "onnxscript.function_libs.torch_lib.ops",
)

for name in MODULES:
    importlib.import_module(name)
