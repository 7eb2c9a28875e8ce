"""What children run in the tests of supervision: small real functions that behave and misbehave."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from app.contract.errors import TrainingDiverged
from app.contract.facts import ModelFacts, TensorFacts
from app.contract.report import Environment, Latency, Measurement, Report
from worker.child import Report as Progress
from worker.entries import InspectRequest
from worker.messages import Inspected, JobDone, Output
from worker.request import RunRequest


def facts() -> ModelFacts:
    return ModelFacts(
        format="architecture",
        task="image-classification",
        accepts=("arrays",),
        inputs=(TensorFacts(name="x", shape=(4,), dtype="float32"),),
        classes=2,
        parameters=10,
        layers=(),
    )


def report(request: RunRequest) -> Report:
    latency = Latency(median_s=1.0, p95_s=1.0, batch_size=1, runs=1, threads=1)
    measurement = Measurement(
        runtime="torch",
        size_bytes=1,
        parameters=1,
        nonzero_parameters=1,
        macs=1,
        metric=None,
        latency=latency,
        peak_memory_bytes=1,
        layers=(),
    )
    environment = Environment(tersor="0", python="3", libraries={}, cpu="", threads=1, device="cpu")
    return Report(
        warnings=("mind the gap",),
        spec=request.spec,
        seed=0,
        uploaded=measurement,
        uploaded_sha256=request.model_sha256,
        artifacts=(),
        steps=(),
        seconds={},
        environment=environment,
    )


def done(request: RunRequest, *outputs: Output) -> JobDone:
    return JobDone(report=report(request), artifacts=outputs)


def succeed(request: RunRequest, progress: Progress) -> JobDone:
    """Delivers the model's own bytes, and says what it saw of its surroundings."""
    progress(0.5, "copy")
    path = request.output / "model.bin"
    path.write_bytes(request.model_path.read_bytes())
    seen = request.output / "seen.txt"
    secrets = [name for name in os.environ if name.startswith(("TERSOR_", "AWS_"))]
    leads = os.getpgid(0) == os.getpid()
    seen.write_text(f"{secrets} {os.environ['TMPDIR'] == str(request.scratch)} {leads} {sys.stdin.read()!r}")
    output = Output(path=str(path), name="model.bin", format="native", media_type="application/octet-stream")
    return done(request, output, Output(path=str(seen), name="seen.txt", format="native", media_type="text/plain"))


def name_teachers(request: RunRequest, progress: Progress) -> JobDone:
    """Delivers the bytes of the other models that the job names."""
    path = request.output / "teachers.bin"
    path.write_bytes(b"|".join(one.id.encode() + b"=" + one.path.read_bytes() for one in request.named))
    return done(request, Output(path=str(path), name="teachers.bin", format="native", media_type="text/plain"))


def inspect(request: InspectRequest, progress: Progress) -> Inspected:
    return Inspected(facts=facts())


def reject(request: InspectRequest, progress: Progress) -> Inspected:
    raise ValueError(f"a bug met {request.path}")


def inspect_and_die(request: InspectRequest, progress: Progress) -> Inspected:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def inspect_on_a_full_disk(request: InspectRequest, progress: Progress) -> Inspected:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def peek(request: RunRequest, progress: Progress) -> JobDone:
    """Opens what the upload names."""
    Path(request.model_path.read_text()).read_bytes()
    return done(request)


def inspect_and_peek(request: InspectRequest, progress: Progress) -> Inspected:
    Path(request.path.read_text()).read_bytes()
    return Inspected(facts=facts())


def inspect_and_share(request: InspectRequest, progress: Progress) -> Inspected:
    Path("/dev/shm/probe").write_text("x")
    return Inspected(facts=facts())


def raise_ours(request: RunRequest, progress: Progress) -> JobDone:
    raise TrainingDiverged


def raise_bug(request: RunRequest, progress: Progress) -> JobDone:
    raise RuntimeError(f"no such key in {request.model_path}")


def raise_memory_error(request: RunRequest, progress: Progress) -> JobDone:
    raise MemoryError


def ask_torch_for_too_much(request: RunRequest, progress: Progress) -> JobDone:
    torch.empty(1 << 60, dtype=torch.uint8)
    return done(request)


def allocate(request: RunRequest, progress: Progress) -> JobDone:
    """Half of it in a grandchild: the limit holds for the group."""
    code = "import time; held = bytearray(b'x') * (160 << 20); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]):
        held = [bytearray(b"x") * (160 << 20)]
        time.sleep(60)
        held.clear()
    return done(request)


def chatter(request: RunRequest, progress: Progress) -> JobDone:
    """Says things for ever, each as soon as the one before it is out."""
    for number in itertools.count():
        progress(0.5, f"step {number}")
    raise AssertionError


def write_too_much(request: RunRequest, progress: Progress) -> JobDone:
    with (request.scratch / "big").open("wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return done(request)


def sleep(request: RunRequest, progress: Progress) -> JobDone:
    """Leaves the numbers of itself and of a grandchild in its scratch folder, and sleeps."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as grandchild:
        assert grandchild.stdout is not None
        grandchild.stdout.readline()
        partial = request.scratch / "pids.partial"
        partial.write_text(f"{os.getpid()} {grandchild.pid}")
        partial.rename(request.scratch / "pids")
        progress(0.25, "sleep")
        time.sleep(60)
    return done(request)


def checkpoint(request: RunRequest, progress: Progress) -> JobDone:
    """Goes on from where the attempt before was, and says so; the model's bytes say how it ends."""
    earlier = {kind: path.read_text() for kind, path in request.checkpoints.items()}
    output = request.output / "earlier.txt"
    output.write_text(json.dumps(earlier))
    (request.scratch / "checkpoint-1-training").write_text(f"after {sorted(earlier.values())}")
    progress.checkpoint("training", "checkpoint-1-training")
    progress(0.5, "checkpointed")
    while (request.scratch / "checkpoint-1-training").exists():
        time.sleep(0.01)
    way = request.model_path.read_bytes()
    if way == b"fail":
        raise TrainingDiverged
    if way == b"sleep" and not earlier:
        time.sleep(60)
    return done(request, Output(path=str(output), name="earlier.txt", format="native", media_type="text/plain"))


def die_by_signal(request: RunRequest, progress: Progress) -> JobDone:
    os.kill(os.getpid(), signal.SIGSEGV)
    return done(request)


def die_by_kill(request: RunRequest, progress: Progress) -> JobDone:
    os.kill(os.getpid(), signal.SIGKILL)
    return done(request)


def leave(request: RunRequest, progress: Progress) -> JobDone:
    os._exit(3)


def deliver_another_file(request: RunRequest, progress: Progress) -> JobDone:
    (request.output / "passwd").symlink_to("/etc/passwd")
    output = Output(path=str(request.output / "passwd"), name="passwd", format="native", media_type="text/plain")
    return done(request, output)


def deliver_a_bad_name(request: RunRequest, progress: Progress) -> JobDone:
    path = request.output / "x"
    path.write_text("x")
    return done(request, Output(path=str(path), name="../x", format="native", media_type="text/plain"))
