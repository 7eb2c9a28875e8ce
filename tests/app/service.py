"""A running service for tests, and what a worker would do to its records."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.contract.blobs import Blobs
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.records import ArtifactRecord, Claim
from app.contract.report import Environment, Latency, Measurement, Report, StepReport
from app.contract.states import JobState
from app.contract.store import JobStore
from app.server import make_server
from app.settings import Settings
from tests.app.documented import Documented
from tests.contract.facts import dataset_facts, model_facts

STEPS = [{"technique": "prune", "sparsity": 0.5}]
HANG_SECONDS = 30.0


CURVE: list[dict[str, float | int | str | None]] = [
    {"layer": layer, "sparsity": sparsity, "divergence": sparsity * steep}
    for layer, steep in (("0.weight", 0.1), ("2.weight", 2.0))
    for sparsity in (0.3, 0.6, 0.9)
]
MEASURED = StepReport(technique="prune", seconds=1.0, details={"sensitivity": CURVE})


class Service:
    """Its address, its store, and a client whose every answer is held against the OpenAPI document."""

    def __init__(self, url: str, settings: Settings, store: JobStore) -> None:
        self.url = url
        self.settings = settings
        self.store = store
        self.blobs = Blobs.open(settings.blobs)
        self.documented = Documented(httpx.get(f"{url}/openapi.json", timeout=HANG_SECONDS).json())
        self.http = self.client()

    def client(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            event_hooks={"response": [self.documented.check]},
            timeout=HANG_SECONDS,
        )

    def files(self) -> set[Path]:
        """Every file of the blob store."""
        root = Path(self.settings.blobs.removeprefix("file://"))
        return {path for path in root.rglob("*") if path.is_file()}

    def claim(self, work_id: str) -> Claim:
        claim = self.store.claim(work_id, "worker-1", 60)
        assert claim is not None
        return claim

    def model(self, http: httpx.Client | None = None, facts: ModelFacts | None = None) -> str:
        """An uploaded and inspected model."""
        answer = (http or self.http).post("/v1/models?filename=m.safetensors", content=b"weights")
        assert answer.status_code == 201, answer.text
        self.store.finish_inspection(self.claim(answer.json()["id"]), facts or model_facts())
        return str(answer.json()["id"])

    def dataset(self, *splits: str, http: httpx.Client | None = None, facts: DatasetFacts | None = None) -> str:
        """An uploaded and inspected dataset."""
        answer = (http or self.http).post("/v1/datasets?filename=d.npz", content=b"arrays")
        assert answer.status_code == 201, answer.text
        self.store.finish_inspection(self.claim(answer.json()["id"]), facts or dataset_facts(*splits))
        return str(answer.json()["id"])

    def job(self, http: httpx.Client | None = None, **spec: Any) -> dict[str, Any]:
        """A submitted job."""
        document = {"model": spec.pop("model", None) or self.model(http), "steps": STEPS} | spec
        answer = (http or self.http).post("/v1/jobs", json=document)
        assert answer.status_code == 202, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def finished(
        self,
        http: httpx.Client | None = None,
        content: bytes = bytes(range(256)) * 20,
        steps: tuple[StepReport, ...] = (MEASURED,),
    ) -> str:
        """A job that has succeeded, with one artifact `model.onnx`."""
        job = self.job(http)["id"]
        claim = self.claim(job)
        key = self.blobs.output_key(job, claim.attempt, "model.onnx")
        source = Path(self.settings.data_dir) / "artifact"
        source.write_bytes(content)
        stored = self.blobs.put_file(source, key)
        artifact = ArtifactRecord(
            job, "model.onnx", "onnx", len(content), stored.sha256, "application/octet-stream", key
        )
        spec = self.store.job_inputs(claim.work_id)[0].resolved
        report = Report(
            warnings=(),
            spec=spec,
            seed=0,
            uploaded=_measurement(),
            uploaded_sha256="0" * 64,
            artifacts=(),
            steps=steps,
            seconds={"load": 0.1},
            environment=Environment(tersor="0", python="3", libraries={}, cpu="x", threads=1, device="cpu"),
        )
        state = self.store.finish_job(claim, report.model_dump(mode="json"), [artifact], ["no smaller"], None)
        assert state is JobState.SUCCEEDED
        return str(job)


def _measurement() -> Measurement:
    return Measurement(
        runtime="torch",
        size_bytes=1,
        parameters=1,
        nonzero_parameters=1,
        macs=1,
        metric=None,
        latency=Latency(median_s=0.1, p95_s=0.2, batch_size=1, runs=3, threads=1),
        peak_memory_bytes=1,
        layers=(),
    )


@contextmanager
def running(settings: Settings) -> Iterator[Service]:
    """Starts a service on a free port of loopback; ends it with the block."""
    server = make_server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + HANG_SECONDS
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    store = JobStore.open(settings.database)
    try:
        yield Service(f"http://127.0.0.1:{port}", settings, store)
    finally:
        store.close()
        server.should_exit = True
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), "the server does not end"
