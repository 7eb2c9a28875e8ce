"""One tree of errors. The docstring is the default detail, `code` is stable and public, `pointer` names the field.

Which HTTP status each one becomes is the web layer's business (`app/errors.py`); a job or an inspection that fails
stores the same error as a `Problem`.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Problem(BaseModel):
    """An error as it is stored with a job or a record, and as a client reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    title: str
    detail: str
    pointer: str | None = None
    retryable: bool = False


def pointer_part(name: str | int) -> str:
    """A name or a place as a part of a JSON pointer (RFC 6901)."""
    return str(name).replace("~", "~0").replace("/", "~1")


class TersorError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str | None = None, *, pointer: str | None = None) -> None:
        self.detail = detail or inspect.getdoc(type(self)) or self.title
        self.pointer = pointer
        super().__init__(self.detail)

    def problem(self) -> Problem:
        """The error as data."""
        return Problem(
            code=self.code, title=self.title, detail=self.detail, pointer=self.pointer, retryable=self.retryable
        )


# --- what a client sent -------------------------------------------------------------------------------------------


class InvalidRequest(TersorError):
    """The request is not what this endpoint takes."""

    code = "invalid_request"
    title = "Invalid request"


class InvalidSpec(TersorError):
    """A field of the specification is missing, unknown or out of range."""

    code = "invalid_spec"
    title = "Invalid specification"


class OrderRefused(TersorError):
    """These steps cannot follow each other in this order."""

    code = "order_refused"
    title = "Steps in an order that cannot work"


class ModelRejected(TersorError):
    """The uploaded file cannot be read as a model."""

    code = "model_rejected"
    title = "Model rejected"


class PackedDamaged(TersorError):
    """The file is no packed artifact, or was damaged on its way."""

    code = "packed_damaged"
    title = "Packed artifact damaged"


class DatasetRejected(TersorError):
    """The uploaded file cannot be read as a dataset."""

    code = "dataset_rejected"
    title = "Dataset rejected"


class DatasetMismatch(TersorError):
    """The model and the dataset do not fit each other, or the steps need a split that the dataset lacks."""

    code = "dataset_mismatch"
    title = "Model and dataset do not fit"


class Unsupported(TersorError):
    """This technique or export does not apply to this model."""

    code = "unsupported"
    title = "Not supported for this model"


class ModelsMismatch(TersorError):
    """Two models of a job do not fit each other."""

    code = "models_mismatch"
    title = "Models do not fit each other"


class UploadTooLarge(TersorError):
    """The body is larger than this service takes."""

    code = "upload_too_large"
    title = "Upload too large"


class UploadIncomplete(TersorError):
    """The body ended before all of it had come. Nothing was kept: send it again."""

    code = "upload_incomplete"
    title = "Upload incomplete"
    retryable = True


class UploadLocked(TersorError):
    """Another request is sending bytes of this upload. Wait a moment, ask for the offset, and go on from there."""

    code = "upload_locked"
    title = "Upload in use"
    retryable = True


class TooManyUploads(TersorError):
    """This account has as many unfinished uploads as it may have. Finish or terminate one of them."""

    code = "too_many_uploads"
    title = "Too many unfinished uploads"
    retryable = True


class ChecksumMismatch(TersorError):
    """The bytes of this request have another checksum than Upload-Checksum says and were discarded: send them again."""

    code = "checksum_mismatch"
    title = "Checksum mismatch"
    retryable = True


class DigestMismatch(TersorError):
    """The uploaded bytes have another SHA-256 than was promised. The upload was discarded: create a new one."""

    code = "digest_mismatch"
    title = "Upload altered on its way"


class UnsupportedMediaType(TersorError):
    """Send the bytes as application/octet-stream, or as multipart/form-data with a part named `file`."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


class NotFound(TersorError):
    """There is nothing here by that name, or it belongs to another account."""

    code = "not_found"
    title = "Not found"


class Unauthorized(TersorError):
    """Send an API key as `Authorization: Bearer tsr_…`. An operator makes one with `tersor keys create`."""

    code = "unauthorized"
    title = "API key missing or not valid"


class Conflict(TersorError):
    """The state of the resource does not allow this."""

    code = "conflict"
    title = "Conflict"


class StillInspecting(Conflict):
    """The upload is still being inspected. Ask again in a moment, or with `Prefer: wait` for the upload itself."""

    code = "still_inspecting"
    title = "Still being inspected"
    retryable = True


class OffsetMismatch(Conflict):
    """The upload does not stand at this offset. Ask for its offset with HEAD and go on from there."""

    code = "offset_mismatch"
    title = "Another offset"


class UploadUnfinished(Conflict):
    """Not all bytes of this upload have come yet."""

    code = "upload_unfinished"
    title = "Upload not finished"


class IdempotencyKeyReused(TersorError):
    """This Idempotency-Key was used before with another body. Use a new key for a new job."""

    code = "idempotency_key_reused"
    title = "Idempotency key reused"


class RangeNotSatisfiable(TersorError):
    """The range lies outside of the artifact."""

    code = "range_not_satisfiable"
    title = "Range not satisfiable"


class PreconditionFailed(TersorError):
    """The precondition in the request does not hold."""

    code = "precondition_failed"
    title = "Precondition failed"


# --- what happened to a job ----------------------------------------------------------------------------------------


class JobFailed(TersorError):
    """The job failed."""

    code = "job_failed"
    title = "Job failed"


class OutOfMemory(JobFailed):
    """The job needed more memory than this worker grants one. Use a smaller batch size or a larger worker."""

    code = "out_of_memory"
    title = "Out of memory"


class TimedOut(JobFailed):
    """The job ran longer than this worker grants one. Use fewer epochs or a longer limit."""

    code = "timeout"
    title = "Time limit reached"


class ChildCrashed(JobFailed):
    """The process that ran the job ended without a word. Run again, the same job would most likely end the same way."""

    code = "crashed"
    title = "The job's process crashed"


class WorkerLost(JobFailed):
    """The workers that ran this job were lost, as often as the service retries. Submit it again."""

    code = "worker_lost"
    title = "Workers lost"
    retryable = True


class RankLost(JobFailed):
    """A process of a training in several processes was lost, as often as the service retries. Submit it again."""

    code = "rank_lost"
    title = "Process of a training lost"
    retryable = True


class HostsMissing(JobFailed):
    """Fewer workers were free for a training over several hosts than it asks for. Ask for fewer, or submit it later."""

    code = "hosts_missing"
    title = "Too few hosts"
    retryable = True


class TrainingDiverged(JobFailed):
    """The training loss became infinite or not a number. Use a lower learning rate."""

    code = "training_diverged"
    title = "Training diverged"


class ExportFailed(JobFailed):
    """The optimized model could not be written in the format asked for."""

    code = "export_failed"
    title = "Export failed"


class ArtifactUnverified(JobFailed):
    """An artifact was written but did not load again or did not give the outputs that it must give."""

    code = "artifact_unverified"
    title = "Artifact failed verification"


# --- inside the service --------------------------------------------------------------------------------------------


class LeaseLost(TersorError):
    """Another worker holds this work now: whatever this attempt still writes is refused."""

    code = "lease_lost"
    title = "Lease lost"


class BlobMissing(TersorError):
    """The stored bytes are gone. Upload the file again."""

    code = "blob_missing"
    title = "Stored bytes missing"
    retryable = True


class ServiceUnavailable(TersorError):
    """A part that this request needs does not answer. Try again in a moment."""

    code = "service_unavailable"
    title = "Service unavailable"
    retryable = True


def problem_classes() -> dict[str, type[TersorError]]:
    """Every error class by its code; a code used twice is a programming error."""
    found: dict[str, type[TersorError]] = {}
    queue: list[type[TersorError]] = [TersorError]
    while queue:
        cls = queue.pop()
        queue.extend(cls.__subclasses__())
        if "code" not in vars(cls):
            continue  # to a client it is its parent
        if cls.code in found:
            raise RuntimeError(f"two error classes share the code {cls.code}")
        found[cls.code] = cls
    return found
