"""Attempts at inspections: what an upload is, found out in a child."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.contract.errors import (
    DatasetRejected,
    JobFailed,
    ModelRejected,
    Problem,
    ServiceUnavailable,
    WorkerLost,
)
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.records import Claim, UploadRecord
from worker.entries import InspectRequest
from worker.lease import LeaseKeeper
from worker.messages import Failed, Inspected
from worker.process import Died, Task
from worker.sandbox.policy import policy_for
from worker.scratch import WORK
from worker.supervision.base import Supervision, Trouble

INSPECTION_COPIES = 6  # of the upload in memory: as it lies, as tensors, as another runtime's, and room to run it


class Inspections(Supervision):
    """Inspects uploads."""

    def _run_inspection(self, claim: Claim, keeper: LeaseKeeper, scratch: Path) -> None:
        upload = self._store.upload_for(claim)
        verdict: ModelFacts | DatasetFacts | Problem
        try:
            verdict = self._inspect(upload, keeper, scratch)
        except JobFailed as error:  # a limit, or an answer that no child of ours gives: both say something of the file
            verdict = _not_inspected(upload, error.detail)
        except ServiceUnavailable as error:  # the worker's disk is full
            raise Trouble(error.problem()) from error
        except Died as death:  # the kernel's doing, or a crash: the next attempt may tell
            raise Trouble(
                WorkerLost(f"The {upload.kind} could not be inspected: {death} Upload it again.").problem()
            ) from death
        waiting = self._insist(keeper, lambda: self._store.finish_inspection(claim, verdict))
        for job_id in waiting:
            self._doorbell.ring(job_id)
        if isinstance(verdict, Problem):
            key = self._blobs.blob_key(upload.sha256)
            self._store.release_blob(upload.sha256, lambda: self._blobs.delete(key))

    def _inspect(self, upload: UploadRecord, keeper: LeaseKeeper, scratch: Path) -> ModelFacts | DatasetFacts | Problem:
        granted = replace(
            self._limits(self._settings.inspect_timeout_seconds),
            data_bytes=self._settings.inspect_memory_bytes + INSPECTION_COPIES * upload.size_bytes,
        )
        work = scratch / WORK
        path = self._fetch(keeper, upload, scratch / "upload")
        request = InspectRequest(upload.kind, path, upload.filename, upload.spec, work)
        policy = policy_for(self._settings, scratch, work, shared_memory=False)
        task = Task(self._entries.inspection, request, scratch, granted, policy, "inspection")
        result = self._supervised(task, keeper)
        if isinstance(result, Inspected) and isinstance(
            result.facts, ModelFacts if upload.kind == "model" else DatasetFacts
        ):
            return result.facts
        if not isinstance(result, Failed):
            return _not_inspected(upload, "the inspection answered with something unreadable.")
        if result.problem.retryable:
            raise Trouble(result.problem)
        # A bug of ours that this file met: to try again would meet it again.
        return result.problem if result.fault is None else _not_inspected(upload, result.problem.detail)


def _not_inspected(upload: UploadRecord, detail: str) -> Problem:
    rejected = ModelRejected if upload.kind == "model" else DatasetRejected
    return rejected(f"The file could not be inspected: {detail}").problem()
