"""A job whose worker was killed goes on where it was, and delivers the bytes of one that was not."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from app.contract.blobs import checkpoint_key
from app.contract.facts import DatasetFacts, SplitFacts
from app.contract.optimizing import Ema
from app.contract.recipes import resolve
from app.contract.records import JobRecord
from app.contract.report import StepReport
from app.contract.spec import ExportFormat, Finetune, JobSpec, Prune, Step
from app.contract.states import JobState
from app.contract.training import EarlyStopping, Training
from tests.worker import bench as benches
from tests.worker.bench import ACCOUNT, Bench
from tests.worker.helpers import digits_data, mlp, part_of
from tests.worker.jobs import job
from worker.checkpoints import file
from worker.checkpoints.points import Kind
from worker.constraints import baked
from worker.context import Context
from worker.request import RunRequest
from worker.run import Clock, optimize
from worker.supervise import Supervisor
from worker.training.states import Unusable

LAYERS: list[dict[str, Any]] = [
    {"type": "Linear", "in_features": 64, "out_features": 64},
    {"type": "BatchNorm1d", "num_features": 64},
    {"type": "ReLU"},
    {"type": "Dropout", "p": 0.2},
    {"type": "Linear", "in_features": 64, "out_features": 32},
    {"type": "ReLU"},
    {"type": "Linear", "in_features": 32, "out_features": 10},
]
DATA = part_of(digits_data(), {"train": 300, "validation": 60, "test": 60})
TRAINING = Training(epochs=4, lr=0.01, checkpoint_steps=3)  # five steps an epoch
STEPS: tuple[Step, ...] = (
    Prune(sparsity=0.5, schedule="cubic", training=TRAINING),
    Prune(sparsity=0.6),
    Finetune(training=TRAINING.model_copy(update={"averaging": Ema(), "early_stopping": EarlyStopping()})),
)
HANG_SECONDS = 120.0


Outcome = tuple[Context, tuple[StepReport, ...]]


class Killed(BaseException):
    """Stands for the end of the process."""


class Attempts:
    """Attempts at one job in this process, and the checkpoints that they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, Path] = {}
        self.said: list[str] = []
        self._count = 0

    def run(self, kill: Callable[[str, int], bool] = lambda step, times: False) -> Outcome:
        """One attempt, up to the export; `kill` is asked with every step's name and how often it has reported."""
        self._count += 1
        self.said = []
        request = self.request(self.folder / str(self._count))

        def progress(share: float, step: str) -> None:
            self.said.append(step)
            if kill(step, self.said.count(step)):
                raise Killed

        return optimize(request, progress, functools.partial(self._store, request.scratch), Clock())

    def request(self, folder: Path) -> RunRequest:
        module = mlp(norm=True, dropout=0.2)
        request = job(folder, module, LAYERS, (64,), DATA, STEPS, export=("native",))
        return replace(request, checkpoints=dict(self.stored))

    def _store(self, scratch: Path, kind: Kind, name: str) -> None:
        self.stored[kind] = (scratch / name).rename(self.folder / f"{self._count}-{name}")


def same(found: Outcome, expected: Outcome) -> bool:
    """Equal bits, and equal reports but for what only a resumed training says."""
    ours, theirs = (baked(context.model.module).state_dict() for context, _ in (found, expected))
    told = [
        [{k: v for k, v in step.details.items() if k != "training_resumed_at_step"} for step in steps]
        for _, steps in (found, expected)
    ]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours) and told[0] == told[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Attempts(tmp_path_factory.mktemp("whole")).run()


@pytest.mark.parametrize(
    ("kill", "again"),
    [
        # In the first step: it is begun again. In the last: the steps before are not.
        (lambda step, times: step == "prune" and times > 12, {"prune", "finetune"}),
        (lambda step, times: step == "finetune" and times > 12, {"finetune"}),
        # Before the last step has a checkpoint of its own: the state between the steps will do.
        (lambda step, times: step == "finetune" and times > 1, {"finetune"}),
    ],
)
def test_it_delivers_the_same_bytes(
    kill: Callable[[str, int], bool], again: set[str], uninterrupted: Outcome, tmp_path: Path
) -> None:
    attempts = Attempts(tmp_path)
    with pytest.raises(Killed):
        attempts.run(kill)
    assert same(attempts.run(), uninterrupted)
    assert {"prune", "finetune"} & set(attempts.said) == again


def test_it_goes_on_through_three_attempts(uninterrupted: Outcome, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for kill in (
        lambda step, times: step == "prune" and times > 12,
        lambda step, times: step == "finetune" and times > 4,
        lambda step, times: step == "finetune" and times > 6,
    ):
        with pytest.raises(Killed):
            attempts.run(kill)
    assert same(attempts.run(), uninterrupted)


@pytest.mark.parametrize("spoil", ["cut", "other network", "no reports"])
def test_a_checkpoint_that_is_no_good_means_to_start_afresh(
    spoil: str, uninterrupted: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = Attempts(tmp_path)
    with pytest.raises(Killed):
        attempts.run(lambda step, times: step == "finetune" and times > 12)
    step, training = attempts.stored["step"], attempts.stored["training"]
    if spoil == "cut":
        training.write_bytes(training.read_bytes()[:-7])
    else:
        parts = file.read(step)
        if spoil == "no reports":
            parts["job"].clear()
        else:
            parts["module"]["0.weight"] = parts["module"]["0.weight"][:5]
        file.write(step, parts)
    assert same(attempts.run(), uninterrupted)
    assert "the job starts afresh" in caplog.text
    assert {"prune", "finetune"} <= set(attempts.said)


def test_a_training_without_the_state_before_it_is_not_gone_on_with(uninterrupted: Outcome, tmp_path: Path) -> None:
    """The store may have lost one of the two."""
    attempts = Attempts(tmp_path)
    with pytest.raises(Killed):
        attempts.run(lambda step, times: step == "finetune" and times > 12)
    del attempts.stored["step"]
    assert same(attempts.run(), uninterrupted)


# --- with a real worker --------------------------------------------------------------------------------------------

WORKER = """
import sys; from pathlib import Path; from tests.worker.test_resuming import bench_in, supervisor
bench = bench_in(Path(sys.argv[1]))
supervisor(bench).run(bench.claim(sys.argv[2]))
"""
LONG = Training(epochs=160, lr=0.003, checkpoint_steps=23, early_stopping=EarlyStopping(patience=160), averaging=Ema())
KILLED_STEPS: tuple[Step, ...] = (Prune(sparsity=0.5, training=TRAINING), Finetune(training=LONG))


def bench_in(folder: Path, threads: int = 1) -> Bench:
    return Bench(folder, lease_seconds=1.0, checkpoint_seconds=0.0, worker_threads=threads)


def supervisor(bench: Bench) -> Supervisor:
    """One that runs real jobs."""
    made = bench.supervisor()
    return Supervisor(bench.settings, bench.store, bench.blobs, made._doorbell, benches.context())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = bench_in(tmp_path)
    yield made
    made.store.close()


def submit(
    bench: Bench, steps: tuple[Step, ...] = KILLED_STEPS, export: tuple[ExportFormat, ...] = ("native",)
) -> JobRecord:
    spec = {"task": "image-classification", "architecture": {"layers": LAYERS}}
    spec["input"] = {"shape": [64], "dtype": "float32"}
    model = bench.upload(save(mlp(norm=True, dropout=0.2).state_dict()), filename="m.safetensors", spec=spec)
    bench.store.finish_inspection(bench.claim(model.id), bench.facts())
    arrays = bench.settings.data_dir / "arrays.npz"
    inputs = {}
    for name, split in DATA.splits.items():
        raw = split.read(range(len(split)))
        inputs |= {f"{name}_inputs": raw.inputs["input"].numpy(), f"{name}_targets": raw.targets.numpy()}  # type: ignore[call-overload,union-attr]
    np.savez(arrays, **inputs)
    data = bench.upload(arrays.read_bytes(), "dataset", "arrays.npz")
    facts = DatasetFacts(kind="arrays", splits={"train": SplitFacts(samples=300, inputs=(), targets="classes")})
    bench.store.finish_inspection(bench.claim(data.id), facts)
    asked = JobSpec(model=model.id, dataset=data.id, steps=steps, export=export)
    return bench.store.add_job(ACCOUNT, asked, resolve(asked), None, None)[0]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def in_the_last_step(bench: Bench, job_id: str) -> bool:
    """Whether its training is stored, and is some way on."""
    found = {kind: bench.settings.data_dir / "blobs" / checkpoint_key(job_id, 1, kind) for kind in ("step", "training")}
    if not all(path.exists() for path in found.values()):
        return False
    try:
        parts = file.read(found["training"])
    except Unusable:  # another took its place while it was read
        return False
    return bool(parts["job"]["index"] == 1 and parts["place"]["step"] > 0)


def delivered(bench: Bench, job_id: str) -> tuple[JobRecord, str, list[dict[str, Any]]]:
    record = bench.job(job_id)
    assert record.state is JobState.SUCCEEDED, record.error
    (artifact,) = bench.store.artifacts(ACCOUNT, job_id)
    return record, artifact.sha256, bench.store.report(ACCOUNT, job_id)["steps"]


def test_a_killed_worker_costs_neither_the_job_nor_its_bits(bench: Bench) -> None:
    whole = submit(bench)
    supervisor(bench).run(bench.claim(whole.id))
    _, expected, told = delivered(bench, whole.id)
    assert bench.blobs.jobs_with_checkpoints() == set()

    killed = submit(bench)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(bench.settings.data_dir), killed.id])
    try:
        eventually(lambda: in_the_last_step(bench, killed.id))
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert bench.job(killed.id).state is JobState.RUNNING
    eventually(lambda: bench.store.next_work(["job"]) == killed.id)
    supervisor(bench).run(bench.claim(killed.id, "worker-2"))
    record, found, steps = delivered(bench, killed.id)
    assert (record.attempt, found) == (2, expected)
    resumed_at = steps[1]["details"].pop("training_resumed_at_step")
    assert 0 < resumed_at < 800
    assert [step["details"] for step in steps] == [step["details"] for step in told]
    assert bench.blobs.jobs_with_checkpoints() == set()
