"""A store, blobs and a supervisor in a temporary folder: what the tests of the worker stand on."""

from __future__ import annotations

import hashlib
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from app.contract.blobs import Blobs, blob_key
from app.contract.facts import ModelFacts
from app.contract.ids import new_id
from app.contract.queue import Doorbell
from app.contract.recipes import resolve
from app.contract.records import Claim, JobRecord, UploadKind, UploadRecord
from app.contract.spec import JobSpec
from app.contract.store import JobStore
from app.settings import Settings
from tests.worker import children
from worker import forkserver
from worker.supervise import Entries, Supervisor

ACCOUNT = "tester"


@cache
def context() -> ForkServerContext:
    made = forkserver.context("tests.worker.children")
    forkserver.warm(made)
    return made


class Bench:
    def __init__(self, folder: Path, **settings: Any) -> None:
        chosen = {"lease_seconds": 2.0, "cancel_grace_seconds": 0.5} | settings
        folder.mkdir(exist_ok=True)
        self.settings = Settings(data_dir=folder, broker_url=f"redis+socket://{folder}/nobody.sock", **chosen)
        self.store = JobStore.open(self.settings.database, max_attempts=self.settings.max_attempts)
        self.store.migrate()
        self.blobs = Blobs.open(self.settings.blobs)

    def supervisor(self, job: str = "succeed", inspection: str = "inspect") -> Supervisor:
        entries = Entries(f"{children.__name__}:{job}", f"{children.__name__}:{inspection}")
        return Supervisor(self.settings, self.store, self.blobs, Doorbell(self.settings.broker), context(), entries)

    def upload(
        self,
        content: bytes = b"weights",
        kind: UploadKind = "model",
        filename: str = "model.bin",
        spec: dict[str, Any] | None = None,
    ) -> UploadRecord:
        digest = hashlib.sha256(content).hexdigest()
        source = self.settings.data_dir / "source"
        source.write_bytes(content)
        self.blobs.put_file(source, blob_key(digest))
        upload_id = new_id("mdl" if kind == "model" else "dst")
        return self.store.add_upload(ACCOUNT, kind, upload_id, filename, digest, len(content), spec or {})

    def ready_model(self, content: bytes = b"weights") -> UploadRecord:
        upload = self.upload(content)
        self.store.finish_inspection(self.claim(upload.id), children.facts())
        return upload

    def submit(self, model: UploadRecord) -> JobRecord:
        spec = JobSpec(model=model.id, recipe="int8")
        return self.store.add_job(ACCOUNT, spec, resolve(spec), None, None)[0]

    def claim(self, work_id: str, owner: str = "worker-1", lease_seconds: float | None = None) -> Claim:
        claim = self.store.claim(work_id, owner, lease_seconds or self.settings.lease_seconds)
        assert claim is not None
        return claim

    def job(self, job_id: str) -> JobRecord:
        return self.store.get_job(ACCOUNT, job_id)

    def run(self, entry: str, content: bytes = b"weights") -> JobRecord:
        """One job through the supervisor, to its end."""
        job = self.submit(self.ready_model(content))
        self.supervisor(job=entry).run(self.claim(job.id))
        assert not any(self.settings.scratch.iterdir())
        return self.job(job.id)

    def facts(self) -> ModelFacts:
        return children.facts()
