"""Runs one claimed piece of work in a child process and writes down what came of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TypeVar

from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from app.contract.blobs import Blobs
from app.contract.errors import (
    BlobMissing,
    DatasetRejected,
    JobFailed,
    LeaseLost,
    ModelRejected,
    Problem,
    RankLost,
    ServiceUnavailable,
    TersorError,
    Unsupported,
    WorkerLost,
)
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.queue import Doorbell
from app.contract.records import Claim, UploadRecord
from app.contract.spec import ResolvedSpec, processes_of
from app.contract.states import UploadStatus
from app.contract.store import JobStore
from app.contract.store.uploads import rejection
from app.settings import Settings
from worker import limits
from worker.checkpoints.keeper import CheckpointKeeper, fetch_earlier, remove_checkpoints
from worker.entries import InspectRequest
from worker.lease import LeaseKeeper
from worker.messages import CheckpointWritten, Failed, Inspected, JobDone, Progress, Result
from worker.process import Child, Died, Stopped, Task
from worker.publish import publish, withdraw, withdraw_earlier
from worker.request import NamedModel, RunRequest
from worker.sandbox.policy import has_accelerator, policy_for
from worker.scratch import WORK, printed, scratch_folder

log = logging.getLogger("tersor.supervise")

STOP_GRACE_SECONDS = 1.0  # a worker that is told to leave has a few seconds in all
RETRY_SECONDS = 1.0
COPY_PAUSES = (0.5, 1.0, 2.0)  # seconds between tries: a store that hiccups is back by then

INSPECTION_COPIES = 6  # of the upload in memory: as it lies, as tensors, as another runtime's, and room to run it

OUTPUT = "output"  # in the folder that the child writes to

T = TypeVar("T")


class Trouble(Exception):
    """The worker's own: the attempt is repeated. `problem` is what remains where it was the last one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True)
class Entries:
    """What children run, as "module:function"."""

    job: str = "worker.entries:job"
    inspection: str = "worker.entries:inspection"


class Supervisor:
    """Runs attempts. One object serves every thread of a worker; `stopping` ends all of them."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        blobs: Blobs,
        doorbell: Doorbell,
        context: ForkServerContext,
        entries: Entries = Entries(),
    ) -> None:
        self._settings, self._store, self._blobs, self._doorbell = settings, store, blobs, doorbell
        self._context, self._entries = context, entries
        self.stopping = threading.Event()

    def run(self, claim: Claim) -> None:
        """One attempt, from the claim to the verdict. Raises nothing: what goes wrong is written down or logged."""
        log.info("%s: attempt %d", claim.work_id, claim.attempt)
        attempt = self._run_job if claim.kind == "job" else self._run_inspection
        try:
            with LeaseKeeper(self._store, claim, self._settings.lease_seconds) as keeper:
                try:
                    with scratch_folder(self._settings.scratch, claim) as scratch:
                        attempt(claim, keeper, scratch)
                except Stopped:
                    self._stop(claim, keeper)
        except LeaseLost:
            log.warning("%s: attempt %d lost its lease", claim.work_id, claim.attempt)
        except Trouble as trouble:
            log.warning("%s: attempt %d goes back: %s", claim.work_id, claim.attempt, trouble)
            self._retry(claim, trouble.problem)
        except Exception as error:
            log.exception("%s: attempt %d could not be supervised", claim.work_id, claim.attempt)
            self._retry(claim, WorkerLost(f"The worker failed ({type(error).__name__}). Submit it again.").problem())

    def _retry(self, claim: Claim, problem: Problem) -> None:
        try:
            self._store.retry(claim, problem)
        except LeaseLost:
            log.warning("%s: attempt %d had ended already", claim.work_id, claim.attempt)
        except SQLAlchemyError as error:
            log.warning("the database does not answer; %s waits for its lease to end: %s", claim.work_id, error)

    def _stop(self, claim: Claim, keeper: LeaseKeeper) -> None:
        """Nothing of the attempt runs any more, and its scratch folder is gone."""
        if keeper.verdict == "lost":
            raise LeaseLost()
        if keeper.verdict == "cancelled":
            self._insist(keeper, lambda: self._store.cancel_job(claim))
            remove_checkpoints(self._blobs, claim.work_id)
        else:
            self._store.release(claim)

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _run_job(self, claim: Claim, keeper: LeaseKeeper, scratch: Path) -> None:
        problem: Problem | None
        try:
            problem = self._attempt_job(claim, keeper, scratch)
        except LeaseLost:
            raise
        except Died as death:
            problem = death.error.problem()
        except TersorError as error:
            problem = error.problem()
        if problem is not None:
            failed = problem
            self._insist(keeper, lambda: self._store.fail_job(claim, failed))
        remove_checkpoints(self._blobs, claim.work_id)

    def _attempt_job(self, claim: Claim, keeper: LeaseKeeper, scratch: Path) -> Problem | None:
        self._copy(keeper, "earlier outputs could not be removed", lambda: withdraw_earlier(self._blobs, claim))
        task = self._job_task(claim, keeper, scratch)
        with CheckpointKeeper(self._blobs, claim, scratch, self._settings.checkpoint_seconds) as checkpoints:
            try:
                result = self._supervised(task, keeper, checkpoints)
            except Died as death:
                if task.request.spec.processes == 1:
                    raise
                raise Trouble(death.error.problem()) from death  # as of any of its other processes
        if isinstance(result, Failed):
            if result.problem.code == RankLost.code:
                raise Trouble(result.problem)
            return result.problem
        if not isinstance(result, JobDone):
            raise JobFailed("The job's process answered with something unreadable.")
        self._finish_job(claim, keeper, result, scratch)
        return None

    def _job_task(self, claim: Claim, keeper: LeaseKeeper, scratch: Path) -> Task:
        job, model, dataset = self._store.job_inputs(claim)
        named = self._store.named_models(claim)
        pointers = job.resolved.named_models()
        for upload in (model, dataset, *named):
            if upload is not None and upload.status is UploadStatus.REJECTED:
                raise rejection(upload.kind, upload.id, upload.problem, pointers.get(upload.id))
        work = scratch / WORK
        output = work / OUTPUT
        output.mkdir()
        granted = self._limits(self._settings.job_timeout_seconds)
        request = RunRequest(
            job_id=job.id,
            spec=job.resolved,
            model_path=self._fetch(keeper, model, scratch / "model"),
            model_filename=model.filename,
            model_spec=model.spec,
            model_sha256=model.sha256,
            dataset_path=None if dataset is None else self._fetch(keeper, dataset, scratch / "dataset"),
            dataset_filename=None if dataset is None else dataset.filename,
            dataset_spec=None if dataset is None else dataset.spec,
            scratch=work,
            output=output,
            threads=granted.threads,
            memory_bytes=granted.memory_bytes,
            checkpoints=self._copy(
                keeper, "a checkpoint could not be copied", lambda: fetch_earlier(self._blobs, claim, scratch)
            ),
            checkpoint_seconds=self._settings.checkpoint_seconds,
            named=tuple(
                NamedModel(one.id, self._fetch(keeper, one, scratch / one.id), one.filename, one.spec) for one in named
            ),
        )
        ranks = job.resolved.processes
        _check_ranks(job.resolved, granted.threads)
        policy = policy_for(self._settings, scratch, work, shared_memory=True, ranks=ranks > 1)
        return Task(self._entries.job, request, scratch, granted, policy)

    def _finish_job(self, claim: Claim, keeper: LeaseKeeper, done: JobDone, scratch: Path) -> None:
        try:
            records = self._copy(
                keeper,
                "the outputs could not be stored",
                lambda: publish(self._blobs, claim, done.artifacts, scratch / WORK / OUTPUT),
            )
            report = done.report.model_dump(mode="json")
            self._insist(keeper, lambda: self._store.finish_job(claim, report, records, done.report.warnings, None))
        finally:
            # Asked of the database: a commit whose answer was lost has delivered all the same.
            if not self._store.has_delivered(claim):
                withdraw(self._blobs, claim)

    # --- inspections --------------------------------------------------------------------------------------------

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

    # --- both ---------------------------------------------------------------------------------------------------

    def _supervised(self, task: Task, keeper: LeaseKeeper, checkpoints: CheckpointKeeper | None = None) -> Result:
        """Runs the task's child to its end. Raises Stopped once the child's group is gone."""

        def heard(said: Progress | CheckpointWritten) -> None:
            if isinstance(said, Progress):
                keeper.note(said.progress, said.step)
            elif checkpoints is not None:
                checkpoints.offer(said)

        try:
            with Child(self._context, task) as child:
                try:
                    result = child.result(heard, lambda: keeper.verdict is not None or self.stopping.is_set())
                except Stopped:
                    grace = STOP_GRACE_SECONDS if self.stopping.is_set() else self._settings.cancel_grace_seconds
                    child.end(0.0 if keeper.verdict == "lost" else grace)
                    raise
        finally:
            if text := printed(task.attempt):
                log.info("%s printed:\n%s", task.attempt.name, text)
        if isinstance(result, Failed) and result.fault is not None:
            log.error("%s: %s", task.attempt.name, result.fault)
        return result

    def _fetch(self, keeper: LeaseKeeper, upload: UploadRecord, path: Path) -> Path:
        def fetch() -> None:
            path.unlink(missing_ok=True)
            self._blobs.fetch(self._blobs.blob_key(upload.sha256), path)

        self._copy(keeper, f"the {upload.kind} could not be copied", fetch)
        return path

    def _copy(self, keeper: LeaseKeeper, what: str, copy: Callable[[], T]) -> T:
        """Tries a few times while the lease holds. Raises Trouble at the end, Stopped where the work is to stop."""
        for pause in (*COPY_PAUSES, None):
            try:
                return copy()
            except (OSError, StoreError, BlobMissing) as error:
                log.warning("%s: %s", what, error)
                if pause is None:
                    raise Trouble(_copy_problem(what, error)) from error
            if self.stopping.wait(pause) or keeper.verdict is not None:
                raise Stopped
        raise AssertionError("the last try returns or raises")

    def _limits(self, seconds: float) -> limits.Limits:
        settings = self._settings
        return limits.Limits(
            memory_bytes=limits.memory_of_one_job(settings.job_memory_bytes, settings.worker_concurrency),
            disk_bytes=settings.job_disk_bytes,
            seconds=seconds,
            processes=settings.job_processes,
            threads=limits.threads_of_one_job(settings.worker_threads, settings.worker_concurrency),
        )

    def _insist(self, keeper: LeaseKeeper, write: Callable[[], T]) -> T:
        """Writes a verdict, also when the database is away for a while: hours of work may hang on it."""
        while True:
            try:
                return write()
            except OperationalError as error:
                if keeper.verdict == "lost":
                    raise LeaseLost() from error
                log.warning("the database does not take the verdict; trying again: %s", error)
                time.sleep(RETRY_SECONDS)


def _check_ranks(spec: ResolvedSpec, threads: int) -> None:
    """Raises Unsupported for more processes than this worker can do good with."""
    ranks = spec.processes
    if ranks == 1:
        return
    index = next(i for i, step in enumerate(spec.steps) if processes_of(step) == ranks)
    pointer = spec.pointer(index) + ("" if spec.recipe is not None else "/training/processes")
    if has_accelerator():
        raise Unsupported(
            "Trainings in several processes run on CPUs, and this worker has an accelerator. Use one.", pointer=pointer
        )
    if ranks > threads:
        raise Unsupported(
            f"The job asks for {ranks} processes, and this worker gives a job {threads} compute thread"
            f"{'s' if threads > 1 else ''}: processes can be {threads} at most.",
            pointer=pointer,
        )


def _not_inspected(upload: UploadRecord, detail: str) -> Problem:
    rejected = ModelRejected if upload.kind == "model" else DatasetRejected
    return rejected(f"The file could not be inspected: {detail}").problem()


def _copy_problem(what: str, error: Exception) -> Problem:
    if isinstance(error, BlobMissing):
        return error.problem()
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return ServiceUnavailable(f"In every attempt {what}: {reason}. Try again later.").problem()
