"""Runs a probe as the supervisor runs a job: a child of the fork server in an attempt's folder, watched to its end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.contract.records import Claim
from app.settings import Settings
from tests.worker import bench
from tests.worker.sandbox.probes import entry
from tests.worker.sandbox.probes.request import ProbeRequest
from worker.limits import Limits
from worker.messages import Failed
from worker.process import Child, Task
from worker.sandbox.policy import Policy, policy_for
from worker.scratch import WORK, printed, scratch_folder

MIB = 1 << 20
INPUT = b"uploaded weights"


@dataclass
class Cell:
    """Where probes run. `outside` is a folder of the service's, with the worker's own data in it."""

    folder: Path
    limits: Limits = field(default_factory=lambda: Limits(4096 * MIB, 1024 * MIB, 120.0, 1, 256))
    log: str = ""

    @property
    def outside(self) -> Path:
        return self.folder / "data"

    def run(self, probe: str, *arguments: Any, walls: bool = True, **changes: Any) -> str:
        """What the probe answers; `changes` are those of the policy. Raises what the supervisor would store."""
        settings = Settings(data_dir=self.outside, sandbox="auto" if walls else "off")
        with scratch_folder(settings.scratch, Claim("job_probe", "job", 1, "worker")) as attempt:
            inputs = attempt / "model"
            inputs.write_bytes(INPUT)
            policy = policy_for(settings, attempt, attempt / WORK, shared_memory=True)
            task = self._task(probe, attempt, policy and dataclasses.replace(policy, **changes), arguments)
            try:
                with Child(bench.context(), task) as child:
                    result = child.result(lambda share, step: None, lambda: False)
            finally:
                self.log = printed(attempt)
            if isinstance(result, Failed):
                raise AssertionError(f"{result.problem.detail}\n{result.fault}\n{self.log}")
            assert not walls or inputs.read_bytes() == INPUT, "the upload was changed"
            return (attempt / WORK / "answer").read_text()

    def _task(self, probe: str, attempt: Path, policy: Policy | None, arguments: tuple[Any, ...]) -> Task:
        request = ProbeRequest(probe, attempt / WORK, attempt / "model", arguments)
        return Task(f"{entry.__name__}:answer", request, attempt, self.limits, policy)
