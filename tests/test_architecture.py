"""The rooms of the design stay apart: app knows nothing of torch and the worker, the worker only app's contract."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "safetensors", "numpy", "worker")
# Of app, the worker may import these and what is below them.
FOR_WORKER = ("app.contract", "app.settings")
WEB = ("fastapi", "starlette", "uvicorn", "httpx")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def sources(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found
    return found


# What unpacks a file may use what it is written with; it is imported when a file is to be unpacked, and not before.
UNPACKING = {"packed": ("numpy",), "unpacking.py": ("safetensors",)}


def test_app_imports_neither_torch_nor_the_worker() -> None:
    wrong = [
        (path.name, name)
        for path in sources("app")
        for name in imports(path)
        if below(name, HEAVY) and not below(name, UNPACKING.get(path.name, UNPACKING.get(path.parent.name, ())))
    ]
    assert not wrong


def test_the_worker_imports_of_app_only_the_contract() -> None:
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sources("worker")
        for name in imports(path)
        if below(name, ("app",)) and not below(name, FOR_WORKER)
    ]
    assert not wrong


def test_the_contract_knows_no_web_framework() -> None:
    found = [(path.name, name) for path in sources("app/contract") for name in imports(path)]
    assert not [(file, name) for file, name in found if below(name, WEB)]
    assert not [(file, name) for file, name in found if below(name, ("app",)) and not below(name, ("app.contract",))]


@pytest.mark.parametrize("module", ["app.main", "app.server", "app.cli", "app.client"])
def test_a_fresh_process_loads_no_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_one_module_knows_statuses_of_errors() -> None:
    """`app/errors.py` alone maps an error's class to a status."""
    knowing = [path.name for path in sources("app") if "errors.InvalidSpec: 422" in path.read_text()]
    assert knowing == ["errors.py"]
