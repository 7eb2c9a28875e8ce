"""Attempts at jobs: inputs in, a child that runs, artifacts and a report out."""

from __future__ import annotations

from pathlib import Path

from app.contract.errors import JobFailed, LeaseLost, Problem, RankLost, TersorError, Unsupported
from app.contract.records import Claim
from app.contract.spec import ResolvedSpec
from app.contract.states import UploadStatus
from app.contract.store.uploads import rejection
from app.settings import Settings
from worker.checkpoints.keeper import CheckpointKeeper, fetch_earlier, remove_checkpoints
from worker.lease import LeaseKeeper
from worker.messages import Failed, JobDone, SeatDone
from worker.process import Died, Task
from worker.publish import publish, withdraw, withdraw_earlier
from worker.request import NamedModel, RunRequest
from worker.sandbox.policy import has_accelerator, policy_for
from worker.scratch import CARDS, OTHERS, WORK
from worker.supervision.base import Supervision, Trouble
from worker.supervision.party import Leader, Part, Party

OUTPUT = "output"  # in the folder that the child writes to


class Jobs(Supervision):
    """Runs jobs, and this host's part in jobs that another worker has claimed."""

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
        spec: ResolvedSpec = task.request.spec
        leader = None if spec.hosts == 1 else Leader(self._store, claim, spec, scratch)
        if leader is not None:
            keeper.note(0.0, "wait for hosts")
            leader.gather(self._doorbell, self._settings.hosts_wait_seconds, lambda: self._is_to_stop(keeper))
        with CheckpointKeeper(self._blobs, claim, scratch, self._settings.checkpoint_seconds) as checkpoints:
            try:
                result = self._supervised(task, keeper, checkpoints, leader)
            except Died as death:
                if spec.processes * spec.hosts == 1:
                    raise
                raise Trouble(death.error.problem()) from death  # as of any of its other processes
        if isinstance(result, Failed):
            if result.problem.code == RankLost.code:
                if leader is not None:
                    leader.find_cause()
                raise Trouble(result.problem)
            return result.problem
        if not isinstance(result, JobDone):
            raise JobFailed("The job's process answered with something unreadable.")
        self._finish_job(claim, keeper, result, scratch)
        return None

    def _run_seat(self, claim: Claim, keeper: LeaseKeeper, scratch: Path) -> None:
        """What goes wrong here ends the seat with it: the leader sees what that means for the job."""
        seat = self._store.seat_of(claim)
        part = Part(seat.job_id, seat.attempt, seat.host)
        try:
            task = self._job_task(Claim(seat.job_id, "job", seat.attempt, ""), keeper, scratch, seat.host)
            result = self._supervised(task, keeper, party=Party(self._store, part, task.request.spec, scratch))
        except Died as death:
            raise Trouble(RankLost(f"Host {seat.host} of the training: {death}").problem()) from death
        except LeaseLost:
            raise
        except TersorError as error:
            raise Trouble(error.problem()) from error
        if isinstance(result, Failed):
            raise Trouble(result.problem)
        if not isinstance(result, SeatDone):
            raise Trouble(JobFailed("The job's process answered with something unreadable.").problem())
        self._insist(keeper, lambda: self._store.leave_seat(claim))

    def _job_task(self, claim: Claim, keeper: LeaseKeeper, scratch: Path, host: int = 0) -> Task:
        """The child's task; `claim` is the leader's where this is another host."""
        job, model, dataset = self._store.job_inputs(claim.work_id)
        named = self._store.named_models(claim.work_id)
        pointers = job.resolved.named_models()
        for upload in (model, dataset, *named):
            if upload is not None and upload.status is UploadStatus.REJECTED:
                raise rejection(upload.kind, upload.id, upload.problem, pointers.get(upload.id))
        granted = self._limits(self._settings.job_timeout_seconds)
        _check_ranks(job.resolved, granted.threads, self._settings)
        work = scratch / WORK
        output = work / OUTPUT
        for folder in (output, work / CARDS, scratch / OTHERS):
            folder.mkdir()
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
            host=host,
            others=scratch / OTHERS,
            interface=self._settings.ranks_interface,
            patience=self._settings.hosts_wait_seconds,
        )
        together = job.resolved.processes * job.resolved.hosts > 1
        policy = policy_for(self._settings, scratch, work, shared_memory=True, ranks=together)
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


def _check_ranks(spec: ResolvedSpec, threads: int, settings: Settings) -> None:
    """Raises Unsupported for trainings that this worker takes no part in, or that it has too little for."""
    if spec.processes * spec.hosts == 1:
        return
    if has_accelerator():
        raise Unsupported(
            "Trainings in several processes run on CPUs, and this worker has an accelerator. Use one.",
            pointer=spec.training_pointer("processes" if spec.processes > 1 else "hosts"),
        )
    if spec.processes > threads:
        raise Unsupported(
            f"The job asks for {spec.processes} processes, and this worker gives a job {threads} compute thread"
            f"{'s' if threads > 1 else ''}: processes can be {threads} at most.",
            pointer=spec.training_pointer("processes"),
        )
    if spec.hosts > 1 and not settings.ranks_interface:
        raise Unsupported(
            "The workers of this service take no part in trainings over several hosts: none of them was told which "
            "network interface to use (TERSOR_RANKS_INTERFACE). Use one host.",
            pointer=spec.training_pointer("hosts"),
        )
