"""What is pinned is pinned once; the compose file is one that compose accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compose() -> list[str]:
    """The compose command of this machine; skips where there is none."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor `docker-compose` is installed")


def test_torch_is_pinned_to_one_version_everywhere() -> None:
    found = {}
    for name in ("Makefile", "Dockerfile", "pyproject.toml", "constraints.txt"):
        found[name] = set(re.findall(r"torch==([\d.]+)", (ROOT / name).read_text()))
    assert all(versions == found["Makefile"] and len(versions) == 1 for versions in found.values()), found


def test_every_direct_dependency_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"]) + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names <= pinned


def test_app_needs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if re.match(r"torch|transformers|onnx|numpy", d)]


def test_compose_accepts_the_file() -> None:
    done = subprocess.run([*compose(), "-f", "docker-compose.yml", "config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for service in ("api", "worker", "valkey", "postgres"):
        assert re.search(rf"^  {service}:", done.stdout, re.MULTILINE)
    assert done.stdout.count("healthcheck:") == 4
