"""The checkpoints of one attempt at a job, as the job itself sees them.

There are two kinds. `step` is the state between two steps of the job: the module and what the steps before have
reported. `training` is the state inside the training of one step, and builds on the `step` of the same number: the
step is begun again as it was, up to its training, which then goes on where it was. The first step needs none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from app.contract.report import StepReport
from worker.checkpoints import file
from worker.constraints import codebooks
from worker.structure.edits import Edit
from worker.training.randomness import load_random, random_state
from worker.training.states import State, Unusable, load_masks, load_module, mask_state, module_state, trained

Kind = Literal["step", "training"]
Announce = Callable[[Kind, str], None]
"""Says that a file of this name lies in the folder, to be taken away."""

Parts = dict[str, State]


class Checkpoints:
    """Writes checkpoints to `folder` and offers them to `announce`, `seconds` apart at least.

    `saved` are those of an earlier attempt. Where nobody is to be told, they serve for coming back within this attempt.
    Of several processes of a host one `writes`; what it wrote, all of them read.
    """

    def __init__(
        self,
        folder: Path,
        announce: Announce | None = None,
        seconds: float = 0.0,
        saved: Mapping[str, Path] | None = None,
        writes: bool = True,
    ) -> None:
        self._folder, self._announce, self._seconds = folder, announce, seconds
        self._writes = writes
        self._saved = {kind: file.read(path) for kind, path in (saved or {}).items()}
        self._index = 0
        self._found: State | None = None
        self._layout: list[tuple[str, torch.Size]] | None = None
        self._portable = True
        self._unannounced: list[Kind] = []
        self._handed_over: dict[Kind, Path] = {}
        self._number = 0
        self._announced_at = time.monotonic()

    def edits(self) -> list[Edit]:
        """What the steps that are known to be done have changed of the network's structure, as far as anyone can tell:
        it was read and not checked."""
        job = self._saved.get("step", {}).get("job", {})
        return job.get("edits") or []

    def begin(self, module: nn.Module, device: torch.device) -> list[StepReport]:
        """Puts the module in the state behind the last step that is known to be done; the reports of all that are.

        Raises Unusable.
        """
        self._layout = _layout(module)
        saved = self._saved.get("step")
        if saved is None:
            return []
        try:
            reports = [StepReport.model_validate(one) for one in saved["job"]["reports"]]
        except (KeyError, ValueError) as error:
            raise Unusable("it does not say which steps are done") from error
        load_state(module, saved, device)
        return reports

    def enter(
        self, reports: Sequence[StepReport], module: nn.Module, device: torch.device, edits: Sequence[Edit] | None = ()
    ) -> None:
        """A step begins, after those that have reported and made `edits`.

        Where one of them put another network in the place of the first, nothing could take the state up: from there on
        a new attempt goes on from what was announced before. One that was edited is edited again.
        """
        self._index = len(reports)
        self._found = None
        self._portable = bool(edits) or self._layout == _layout(module)
        if self._announce is not None and self._index and self._portable:
            job: State = {"reports": [one.model_dump(mode="json") for one in reports], "edits": list(edits or ())}
            state = {"job": job, "module": module_state(module), "masks": mask_state(module)}
            file.write(self._path("step"), state | {"random": random_state(device)})
            self._unannounced = ["step"]
            self._announce_if_due()

    def remember(self, found: State) -> None:
        """What was found out before the step's training; it comes with every checkpoint of that."""
        self._found = found

    def remembered(self) -> State | None:
        """What an earlier attempt had found out, where it left a checkpoint of this step's training."""
        job = self._saved.get("training", {}).get("job", {})
        found = job.get("found") if job.get("index") == self._index else None
        return found if isinstance(found, dict) else None

    def waiting(self) -> Parts | None:
        """What an earlier attempt left of this step's training; only the first who asks gets it."""
        saved = self._saved.get("training")
        if saved is None or saved.get("job", {}).get("index") != self._index:
            return None
        return self._saved.pop("training")

    def save(self, parts: Parts) -> None:
        """Writes the state inside the step's training."""
        if not self._writes:
            return
        file.write(self._path("training"), parts | {"job": {"index": self._index, "found": self._found}})
        if self._announce is not None and self._portable:
            self._unannounced = [kind for kind in self._unannounced if kind == "step"] + ["training"]
            self._announce_if_due()

    def load(self) -> Parts:
        """What was saved last."""
        return file.read(self._path("training"))

    def clear(self) -> None:
        """The step's training is over, and nothing comes back to it any more."""
        if not self._writes:
            return
        self._path("training").unlink(missing_ok=True)
        self._unannounced = [kind for kind in self._unannounced if kind == "step"]

    def _announce_if_due(self) -> None:
        if time.monotonic() - self._announced_at < self._seconds:
            return
        assert self._announce is not None
        for kind in self._unannounced:
            self._number += 1
            copy = self._folder / f"checkpoint-{self._number}-{kind}"
            shutil.copyfile(self._path(kind), copy)  # given away, where the original is come back to
            self._announce(kind, copy.name)
            if (older := self._handed_over.get(kind)) is not None:
                older.unlink(missing_ok=True)  # nobody took it in time
            self._handed_over[kind] = copy
        self._unannounced = []
        self._announced_at = time.monotonic()

    def _path(self, kind: Kind) -> Path:
        return self._folder / f"{kind}.checkpoint"


def load_state(module: nn.Module, parts: Parts, device: torch.device, random: str = "random") -> None:
    """Masks, weights and random numbers out of a checkpoint; `random` names the part with these. Raises Unusable."""
    try:
        load_masks(module, parts["masks"])
        load_module(module, parts["module"])
        load_random(parts[random], device)
    except KeyError as error:
        raise Unusable(f"it lacks {error}") from error


def _layout(module: nn.Module) -> list[tuple[str, torch.Size]]:
    """What has to be the same for a state to be taken up; codebooks come with it."""
    entries = {id(own.entries) for own in codebooks(module).values()}
    return sorted((name, tensor.shape) for name, tensor in trained(module) if id(tensor) not in entries)
