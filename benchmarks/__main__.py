"""`python -m benchmarks [NAME …]`: runs the benchmarks, or the named ones, and prints their tables."""

from __future__ import annotations

import importlib
import sys

from benchmarks.harness import heading

NAMES = ("upload", "polling", "first_step", "training", "estimate", "processes", "packing")

for name in sys.argv[1:] or NAMES:
    module = importlib.import_module(f"benchmarks.{name}")
    print(f"## {heading(module)}\n")
    module.main()
    print()
