"""`tersor up` refuses what cannot work with a sentence."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


def up(folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "up", "--port", str(port), "--data-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = up(tmp_path, taken.getsockname()[1])
    assert done.returncode == 1
    assert "Give another --port" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
