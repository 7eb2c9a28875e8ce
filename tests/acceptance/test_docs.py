"""The walk-throughs of the documents are run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.acceptance.conftest import Service

ROOT = Path(__file__).parent.parent.parent


def walk(document: str, url: str, folder: Path, blocks_at_least: int) -> str:
    """Runs the marked blocks of a document in a folder; what they print."""
    blocks = re.findall(r"<!-- walkthrough -->\n```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(blocks) >= blocks_at_least
    env = os.environ | {
        "TERSOR_URL": url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(blocks)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_walk_through_works(tersor: Service, tmp_path: Path) -> None:
    printed = walk("README.md", tersor.url, tmp_path, 4)
    assert " succeeded\n" in printed
    counted = json.loads(printed.splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    (onnx,) = (item for item in report["artifacts"] if item["name"] == "model.onnx")
    assert onnx["measurement"]["metric"]["value"] == counted["correct"] / counted["samples"]
    assert onnx["measurement"]["size_bytes"] == (tmp_path / "model.onnx").stat().st_size


def test_an_upload_by_curl_resumes(tersor: Service, lenet: Path) -> None:
    printed = walk("docs/http.md", tersor.url, lenet, 1)
    assert re.match(r"HTTP/1.1 (200|404) ", printed)
    model = json.loads(printed.splitlines()[-1])
    assert model["filename"] == "lenet.safetensors"
    with tersor.client() as client:
        assert client.model(model["id"], wait=30)["status"] == "ready"
