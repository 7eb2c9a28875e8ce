"""A job specification, from the client's JSON to a job that can work, or to the sentence that says why it cannot."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from app.contract.catalogue import check_order
from app.contract.choosing import settled
from app.contract.compatibility import check, check_named
from app.contract.errors import DatasetRejected, InvalidSpec, ModelRejected, NotFound, StillInspecting
from app.contract.estimate import estimate
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.native import planned
from app.contract.recipes import resolve
from app.contract.records import JobRecord, UploadKind, UploadRecord
from app.contract.spec import ExportFormat, JobSpec, ResolvedSpec
from app.contract.split_needs import check_splits
from app.contract.states import UploadStatus
from app.contract.store import JobStore
from app.errors import InvalidFields, InvalidParameter
from app.pointers import violations
from app.schemas import DryRunView, PlannedArtifact

MAX_KEY = 255


def parse(document: Any) -> JobSpec:
    """Raises InvalidFields, with every field at fault."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise InvalidFields(violations(error, document)) from None


def submit(store: JobStore, account: str, spec: JobSpec, key: str | None) -> tuple[JobRecord, bool]:
    """The job, and whether it is new: the same key with the same specification gives the earlier job.

    Raises what `check` raises, InvalidSpec for a model or a dataset that is not there, ModelRejected, DatasetRejected.
    What cannot be known while an upload is being inspected is checked by the worker.
    """
    resolved = resolve(spec)
    check_order(resolved)
    printed = fingerprint(spec)
    earlier = store.find_replay(account, key, printed) if key is not None else None
    if earlier is not None:
        return earlier, False
    _check_inputs(store, account, resolved)
    return store.add_job(account, spec, resolved, key, printed if key is not None else None)


def dry_run(store: JobStore, account: str, spec: JobSpec) -> DryRunView:
    """What the job would do, without doing it.

    Raises what `submit` raises, and Conflict while its model or dataset is still being inspected.
    """
    resolved = resolve(spec)
    check_order(resolved)
    model, dataset, named = _check_inputs(store, account, resolved)
    pointers = resolved.named_models()
    for record in (model, dataset, *named):
        if record is not None and record.facts is None:
            pointer = f"/{record.kind}" if record in (model, dataset) else pointers[record.id]
            raise StillInspecting(f"The {record.kind} {record.id} is still being inspected.", pointer=pointer)
    assert isinstance(model.facts, ModelFacts)
    data = None if dataset is None else dataset.facts
    assert data is None or isinstance(data, DatasetFacts)
    resolved = settled(resolved, model.facts, data)
    return DryRunView(
        recipe=resolved.recipe,
        steps=resolved.steps,
        export=resolved.export,
        estimate=estimate(resolved, model.facts, data, _inspected(named)),
        artifacts=tuple(_planned(format, model.facts) for format in planned(resolved, model.facts)),
    )


def _planned(format: ExportFormat, model: ModelFacts) -> PlannedArtifact:
    names = {
        "native": model.native_file,
        "onnx": "model.onnx",
        "packed": "model.tsr",
        "compressed-tensors": "model.compressed-tensors.zip",
        "pt2": "program.pt2",
    }
    return PlannedArtifact(name=names[format], format=format)


def fingerprint(spec: JobSpec) -> str:
    """SHA-256 of the specification: equal whatever the order of its fields and however its numbers are written."""
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def idempotency_key(header: str | None) -> str | None:
    """The key itself; raises InvalidParameter unless it is 1 to 255 visible ASCII characters."""
    if header is None:
        return None
    if not (1 <= len(header) <= MAX_KEY and all("!" <= character <= "~" for character in header)):
        raise InvalidParameter(
            f"An Idempotency-Key has 1 to {MAX_KEY} visible ASCII characters and no spaces.", "Idempotency-Key"
        )
    return header


def _check_inputs(
    store: JobStore, account: str, spec: ResolvedSpec
) -> tuple[UploadRecord, UploadRecord | None, list[UploadRecord]]:
    """The job's model and dataset and the other models that it names, checked as far as they have been inspected."""
    model = _usable(store, account, "model", spec.model)
    dataset = None if spec.dataset is None else _usable(store, account, "dataset", spec.dataset)
    named = [_usable(store, account, "model", id, pointer) for id, pointer in spec.named_models().items()]
    _check_facts(spec, model, dataset, named)
    return model, dataset, named


def _check_facts(
    spec: ResolvedSpec, model: UploadRecord, dataset: UploadRecord | None, named: list[UploadRecord]
) -> None:
    facts = None if dataset is None else dataset.facts
    assert facts is None or isinstance(facts, DatasetFacts)
    if isinstance(model.facts, ModelFacts):
        check_named(spec, model.facts, _inspected(named), facts)
    if dataset is not None and facts is None:
        return  # it is being inspected
    if isinstance(model.facts, ModelFacts):
        check(spec, model.facts, facts)
    else:
        check_splits(spec, facts)


def _inspected(records: list[UploadRecord]) -> dict[str, ModelFacts]:
    return {record.id: record.facts for record in records if isinstance(record.facts, ModelFacts)}


def _usable(store: JobStore, account: str, kind: UploadKind, id: str, pointer: str | None = None) -> UploadRecord:
    """An upload of the account's that was not rejected; `pointer` is the field that names it."""
    pointer = pointer or f"/{kind}"
    try:
        record = store.get_upload(account, id)
    except NotFound:
        raise InvalidSpec(
            f"There is no {kind} {id}, or it belongs to another account. Upload it first.", pointer=pointer
        ) from None
    if record.status is UploadStatus.REJECTED:
        why = record.problem.detail if record.problem is not None else "its inspection failed."
        refused = ModelRejected if kind == "model" else DatasetRejected
        raise refused(f"The {kind} {id} was rejected: {why}", pointer=pointer)
    return record
