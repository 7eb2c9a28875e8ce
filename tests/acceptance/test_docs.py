"""The README's walk-through is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.acceptance.conftest import Service

ROOT = Path(__file__).parent.parent.parent


def test_the_walk_through_works(tersor: Service, tmp_path: Path) -> None:
    blocks = re.findall(r"<!-- walkthrough -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    env = os.environ | {
        "TERSOR_URL": tersor.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(blocks)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " succeeded\n" in done.stdout
    counted = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    (onnx,) = (item for item in report["artifacts"] if item["name"] == "model.onnx")
    assert onnx["measurement"]["metric"]["value"] == counted["correct"] / counted["samples"]
    assert onnx["measurement"]["size_bytes"] == (tmp_path / "model.onnx").stat().st_size
