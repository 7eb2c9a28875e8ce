"""The story of a job: load, steps, export, verify, measure, report. Runs in a process of its own."""

from __future__ import annotations

import copy
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from app.contract.automatic import Automatic
from app.contract.catalogue import int8_exports
from app.contract.choosing import choose, settled
from app.contract.compatibility import check, check_named, check_step
from app.contract.errors import InvalidSpec, ModelRejected, Unsupported
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.native import written
from app.contract.report import Report, StepReport
from app.contract.spec import DistillStep, ResolvedSpec, Step, trainings_of
from worker.checkpoints.points import Announce, Checkpoints
from worker.constraints import baked
from worker.context import Context
from worker.data import open_data
from worker.data.feed import Feed
from worker.encodings import check_encodings
from worker.evaluation.compare import compare, reload
from worker.evaluation.environment import environment
from worker.evaluation.verify import check_samples, verify
from worker.evaluation.warnings import warnings
from worker.export.onnx import check_size
from worker.export.registry import EXPORTERS
from worker.loading import load_model
from worker.model import Model
from worker.ranks.ranks import Ranks
from worker.ranks.state import check_saved
from worker.request import OutputFile, RunRequest, RunResult
from worker.structure.restructured import retake
from worker.techniques.registry import TECHNIQUES
from worker.training.states import Unusable

log = logging.getLogger("tersor.job")

Progress = Callable[[float, str], None]
"""Takes the share of the job that is done, 0 to 1, and the name of the stage or step that is running."""

# Shares of the progress bar at which the stages after the steps begin. Training, where there is any, is most of a job.
STEPS_FROM, EXPORT_FROM, VERIFY_FROM, MEASURE_FROM = 0.02, 0.75, 0.87, 0.9


def run_job(
    request: RunRequest, progress: Progress, announce: Announce | None = None, ranks: Ranks | None = None
) -> RunResult:
    """Runs one attempt and leaves its artifacts in `request.output`. Raises the errors of app.contract.errors.

    `announce` is told of checkpoints. `ranks` are the processes that share the attempt, of which this is the first.
    """
    clock = Clock()
    context, steps = optimize(request, progress, announce, clock, ranks)
    asked, data = request.spec, None if context.feed is None else context.feed.data.facts
    request = replace(request, spec=settled(asked, context.uploaded.facts, data))
    context.progress = functools.partial(_step_progress, progress, "export", EXPORT_FROM, VERIFY_FROM - EXPORT_FROM)
    context.progress(0.0)
    with clock("export"):
        # Both artifacts carry what the upload's own dtype can hold, and are verified against just that.
        module = context.model.round_as_stored(baked(context.model.module).cpu().eval())
        formats = written(request.spec.export, context.model.native_as)
        exported = [EXPORTERS[name](module, context, request.output) for name in formats]
    progress(VERIFY_FROM, "verify")
    with clock("verify"):
        samples = check_samples(context.model, context.feed)
        files = [verify(one, module, samples, functools.partial(reload, request, context)) for one in exported]
    progress(MEASURE_FROM, "measure")
    with clock("measure"):
        uploaded, artifacts = compare(request, context, samples, exported, files)
    progress(1.0, "measure")
    report = Report(
        warnings=warnings(
            request.spec,
            context.model.facts,
            data,
            uploaded,
            artifacts,
            steps,
        ),
        spec=asked,
        seed=request.spec.seed,
        uploaded=uploaded,
        uploaded_sha256=request.model_sha256,
        artifacts=artifacts,
        steps=steps,
        seconds=clock.seconds,
        environment=environment(str(context.device), request.threads),
    )
    return RunResult(
        report=report,
        artifacts=tuple(OutputFile(one.path, one.path.name, one.format, one.media_type) for one in exported),
    )


def follow(request: RunRequest, ranks: Ranks) -> None:
    """The part of the other processes in a job: its steps, up to the last that trains."""
    spec = request.spec.model_copy(update={"steps": request.spec.steps[: _last_trained(request.spec) + 1]})
    optimize(replace(request, spec=spec), lambda share, name: None, None, Clock(), ranks)


def _last_trained(spec: ResolvedSpec) -> int:
    """The index of the last step that trains; -1 where none does."""
    return max((index for index, step in enumerate(spec.steps) if trainings_of(step)), default=-1)


def optimize(
    request: RunRequest, progress: Progress, announce: Announce | None, clock: Clock, ranks: Ranks | None = None
) -> tuple[Context, tuple[StepReport, ...]]:
    """Loads everything and takes the steps, from a checkpoint on where there is one that is any good."""
    progress(0.0, "load")
    try:
        return _optimize(request, progress, announce, clock, ranks or Ranks())
    except Unusable as reason:
        log.warning("The checkpoint of an earlier attempt is of no use, and the job starts afresh: %s.", reason)
        return _optimize(replace(request, checkpoints={}), progress, announce, clock, ranks or Ranks())


def _optimize(
    request: RunRequest, progress: Progress, announce: Announce | None, clock: Clock, ranks: Ranks
) -> tuple[Context, tuple[StepReport, ...]]:
    _settle(request)
    with clock("load"):
        context = replace(_load(request), ranks=ranks)
        spec = _check(request.spec, context)
        data = None if context.feed is None else context.feed.data.facts
    with clock("steps"):
        saved, seconds = request.checkpoints, request.checkpoint_seconds
        check_saved(saved, ranks)
        context.checkpoints = Checkpoints(request.scratch, announce, seconds, saved, ranks.leads)
        steps = _run_steps(spec, context, progress, context.checkpoints)
        return context, _explained(request.spec, context.uploaded.facts, data, steps)


class Clock:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _settle(request: RunRequest) -> None:
    """Threads and seeds, for everything that follows."""
    torch.set_num_threads(request.threads)
    seed = request.spec.seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _load(request: RunRequest) -> Context:
    model = load_model(request.model_path, request.model_filename, request.model_spec, request.scratch)
    feed = None
    if request.dataset_path is not None:
        assert request.dataset_filename is not None
        data = open_data(request.dataset_path, request.dataset_filename, request.dataset_spec or {}, request.scratch)
        feed = Feed(model, data)
    named = {
        one.id: replace(load_model(one.path, one.filename, one.spec, request.scratch), spec=one.spec)
        for one in request.named
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.module.to(device)
    return Context(
        model=model,
        teacher=_frozen(model.module),
        feed=feed,
        device=device,
        seed=request.spec.seed,
        scratch=request.scratch,
        progress=lambda share: None,
        named=named,
        memory_bytes=request.memory_bytes,
    )


def _frozen(module: nn.Module) -> nn.Module:
    """A copy that nothing trains: the teacher."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _check(spec: ResolvedSpec, context: Context) -> ResolvedSpec:
    """Everything that can be refused is refused before anything is computed; what method auto becomes is settled."""
    facts = context.model.facts
    data = None if context.feed is None else context.feed.data
    check(spec, facts, None if data is None else data.facts)
    spec = settled(spec, facts, None if data is None else data.facts)
    others = {id: model.facts for id, model in context.named.items()}
    check_named(spec, facts, others, None if data is None else data.facts)
    for id, pointer in spec.named_models().items():
        check_encodings(context.model, context.named[id], id, pointer, data)
    _check_steps(spec, 0, context.model)
    int8 = any(int8_exports(step) for step in spec.steps)  # which is found on the ONNX graph
    if "onnx" in spec.export or ("pt2" in spec.export and int8):
        check_size(context.model.module)
    return spec


def _check_steps(spec: ResolvedSpec, start: int, model: Model) -> None:
    """Raises Unsupported or InvalidSpec where a step from `start` on finds nothing in the model that it is for.

    What follows a student is about that, and is checked when it has taken the model's place.
    """
    for index, step in enumerate(spec.steps[start:], start):
        pointer = spec.pointer(index)
        check_step(step, model.facts, pointer)
        with _located(pointer, step):
            reason = TECHNIQUES[step.technique].applies(step, model)
            if reason is not None:
                raise Unsupported(reason)
        if _replaces(step):
            return


def _replaces(step: Step) -> bool:
    """Whether a student takes the model's place."""
    return isinstance(step, DistillStep) and step.student is not None


def _run_steps(
    spec: ResolvedSpec, context: Context, progress: Progress, checkpoints: Checkpoints
) -> tuple[StepReport, ...]:
    """The steps in order, each with an equal share of the progress that belongs to steps.

    Those that a checkpoint has the outcome of are not taken again.
    """
    retake(context, checkpoints.edits())
    done = list(checkpoints.begin(context.model.module, context.device))
    width = (EXPORT_FROM - STEPS_FROM) / len(spec.steps)
    for index, step in enumerate(spec.steps[len(done) :], len(done)):
        start = STEPS_FROM + index * width
        context.progress = functools.partial(_step_progress, progress, step.technique, start, width)
        context.progress(0.0)
        checkpoints.enter(done, context.model.module, context.device, context.edits)
        began = time.perf_counter()
        with _located(spec.pointer(index), step):
            details = TECHNIQUES[step.technique].apply(step, context)
        done.append(StepReport(technique=step.technique, seconds=time.perf_counter() - began, details=details))
        if _replaces(step):
            _check_steps(spec, index + 1, context.model)
        if index == _last_trained(spec):
            context.ranks.part()
    return tuple(done)


def _explained(
    asked: ResolvedSpec, model: ModelFacts, data: DatasetFacts | None, steps: tuple[StepReport, ...]
) -> tuple[StepReport, ...]:
    """With what method auto has chosen, and why."""
    found = []
    for index, (step, report) in enumerate(zip(asked.steps, steps, strict=True)):
        if isinstance(step, Automatic):
            choice = choose(step, model, data, asked.export, asked.pointer(index))
            told = {"target": step.target, "method": choice.step.method, "why": choice.why}
            report = report.model_copy(update={"details": report.details | told})
        found.append(report)
    return tuple(found)


@contextmanager
def _located(pointer: str, step: Step) -> Iterator[None]:
    """What a step refuses lies in the step; a student is described there, and refused as an upload is."""
    try:
        yield
    except ModelRejected as failure:
        inside = f"/student{failure.pointer or ''}" if _replaces(step) else ""
        raise InvalidSpec(failure.detail, pointer=pointer + inside) from failure
    except (InvalidSpec, Unsupported) as failure:
        failure.pointer = failure.pointer or pointer
        raise


def _step_progress(progress: Progress, name: str, start: float, width: float, share: float) -> None:
    progress(start + width * share, name)
