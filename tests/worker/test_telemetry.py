"""No library reports to its maker from a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_onnxruntime_keeps_no_database_and_starts_no_thread(tmp_path: Path) -> None:
    """Imported by itself, onnxruntime 1.32 leaves an identifier and a queue of events at home, and uploads them."""
    code = "import os, worker, onnxruntime; print(len(os.listdir('/proc/self/task')))"
    # NumPy's threads are not what is looked for.
    environment = os.environ | {"HOME": str(tmp_path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "CI"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert list(tmp_path.rglob("*")) == []
