"""A store with a clock that the test turns, and the few steps that most tests begin with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from app.contract.facts import DatasetFacts, ModelFacts, SplitFacts, TensorFacts
from app.contract.ids import new_id
from app.contract.recipes import resolve
from app.contract.records import Claim, JobRecord, UploadRecord
from app.contract.spec import JobSpec
from app.contract.store import JobStore

ACCOUNT = "alice"
LEASE = 30.0
INPUT = TensorFacts(name="x", shape=(4,), dtype="float32")
MODEL_FACTS = ModelFacts(
    format="architecture",
    task="image-classification",
    accepts=("arrays",),
    inputs=(INPUT,),
    classes=2,
    parameters=10,
    layers=(),
)
DATASET_FACTS = DatasetFacts(kind="arrays", splits={"train": SplitFacts(samples=3, inputs=(INPUT,))})

T = TypeVar("T")


class Clock:
    """Seconds since the epoch, as `time.time` gives them."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    @property
    def moment(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    def pass_(self, seconds: float) -> datetime:
        self.now += seconds
        return self.moment


@dataclass
class Stage:
    store: JobStore
    clock: Clock

    def upload(self, kind: str = "model", account: str = ACCOUNT, sha256: str = "0" * 64) -> UploadRecord:
        id = new_id("mdl" if kind == "model" else "dst")
        return self.store.add_upload(account, kind, id, f"{kind}.bin", sha256, 5, {"task": None})  # type: ignore[arg-type]

    def claim(self, work_id: str, owner: str = "worker-1") -> Claim:
        claim = self.store.claim(work_id, owner, LEASE)
        assert claim is not None
        return claim

    def ready(self, upload: UploadRecord) -> list[str]:
        facts = MODEL_FACTS if upload.kind == "model" else DATASET_FACTS
        return self.store.finish_inspection(self.claim(upload.id), facts)

    def model(self) -> UploadRecord:
        upload = self.upload()
        self.ready(upload)
        return upload

    def spec(self, model: str | None = None, dataset: str | None = None) -> JobSpec:
        return JobSpec(model=model or self.model().id, dataset=dataset, recipe="int8", metadata={"n": [1]})

    def job(self, spec: JobSpec | None = None, account: str = ACCOUNT) -> JobRecord:
        chosen = spec or self.spec()
        return self.store.add_job(account, chosen, resolve(chosen), None, None)[0]

    def look(self, job: JobRecord) -> JobRecord:
        return self.store.get_job(ACCOUNT, job.id)

    def later(self, seconds: float) -> datetime:
        return self.clock.moment + timedelta(seconds=seconds)


def at_once(times: int, call: Callable[[int], T]) -> list[T | Exception]:
    """The results of calls that start together in threads of their own, in any order."""
    gate, results = threading.Barrier(times), []

    def run(number: int) -> None:
        gate.wait()
        try:
            results.append(call(number))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == times
    return results
