"""Every artifact of a quantize step in a fresh process that has only its runtime: it gives what the worker measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.contract.spec import JobSpec
from tests.worker import fresh
from tests.worker.helpers import MemorySplit, part_of
from tests.worker.jobs import LENET_LAYERS, Recorder, job
from tests.worker.test_run import SHAPE, SMALL
from worker.data.base import Data
from worker.model import Model
from worker.objectives.classification import Classification
from worker.run import run_job

BRIEF = {"steps": 5, "distill": {}}
STEPS: dict[str, dict[str, Any]] = {
    "static": {"method": "static"},
    "dynamic": {"method": "dynamic"},
    "weight_only": {"method": "weight_only", "bits": 4},
    "qat, 8 bits": {"method": "qat", "training": BRIEF},
    "qat, 4 bits": {"method": "qat", "bits": 4, "training": BRIEF},
    "codebook": {"method": "codebook"},
}


@pytest.fixture(scope="module")
def few(mnist: Data) -> Data:
    return part_of(mnist, SMALL)


@pytest.mark.parametrize(
    "name",
    [name if name in ("static", "weight_only") else pytest.param(name, marks=pytest.mark.slow) for name in STEPS],
)
def test_a_fresh_process_gives_the_figures_of_the_report(
    trained_lenet: Model, few: Data, name: str, tmp_path: Path
) -> None:
    spec = {"model": "mdl_" + "0" * 26, "steps": [{"technique": "quantize"} | STEPS[name]]}
    steps = JobSpec.model_validate(spec).steps
    assert steps is not None
    asked = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few, steps)
    report = run_job(asked, Recorder()).report
    split = few.splits["test"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    for artifact, runtime in zip(report.artifacts, ("torch", "onnxruntime"), strict=True):
        file, batch = asked.output / artifact.name, Classification().evaluation_batch
        found = fresh.answers(runtime, file, split.inputs.numpy(), tmp_path, batch)
        right = float((torch.from_numpy(found).argmax(1) == split.targets).float().mean())
        assert artifact.measurement.runtime == runtime
        assert artifact.measurement.metric is not None
        assert artifact.measurement.metric.value == pytest.approx(right, abs=1e-6)


def test_the_process_has_nothing_else(tmp_path: Path) -> None:
    """Else the test above would say nothing."""
    for runtime, other in (("onnxruntime", "torch"), ("torch", "onnxruntime"), ("program", "safetensors")):
        code = (
            f"import sys; sys.path.insert(0, {str(Path(fresh.__file__).parent)!r}); import fresh; "
            f"fresh.leave({runtime!r}); import {other}"
        )
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
        assert f"No module named '{other}'" in done.stderr
