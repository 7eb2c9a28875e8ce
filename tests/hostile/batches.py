"""What children run for the mutations: a batch of files made and inspected one after the other, in one sandbox."""

from __future__ import annotations

import os
import shutil

from app.contract.errors import DatasetRejected, ModelRejected
from tests.hostile.mutations import SEEDS
from tests.hostile.watched import canaries, cpu_seconds, tell, told
from worker import entries
from worker.child import Report
from worker.entries import InspectRequest
from worker.messages import Inspected


def inspection(request: InspectRequest, progress: Report) -> Inspected:
    """Inspects many mutations of one file, one after the other; the spec says of which, from which number, how many."""
    seed, content = SEEDS[request.spec["seed"]], request.path.read_bytes()
    path = request.scratch / "mutant"
    slowest = 0.0
    with told(request.scratch) as figures:
        for number in range(request.spec["first"], request.spec["first"] + request.spec["count"]):
            path.write_bytes(seed.mutant(content, number))
            tell(f"mutation {number}")  # the last one that is printed is the one that crashed
            own = request.scratch / "own"
            own.mkdir()
            os.chdir(own)
            before = cpu_seconds()
            outcome = _outcome(InspectRequest(seed.kind, path, "upload.bin", seed.spec, own), progress)
            slowest = max(slowest, cpu_seconds() - before)
            figures.canaries += canaries(own)
            figures.tally[outcome] = figures.tally.get(outcome, 0) + 1
            if outcome not in ("loaded", "refused", "refused unforeseen"):
                figures.faults.append(f"{number}: {outcome}")
            os.chdir(request.scratch)
            shutil.rmtree(own)
            figures.seconds = round(slowest, 3)
        path.unlink()
        if left := [entry.name for entry in request.scratch.iterdir()]:
            figures.faults.append(f"left in scratch: {left}")
    raise ModelRejected("This is no model but a batch of mutations, and they have been inspected.")


def _outcome(request: InspectRequest, progress: Report) -> str:
    try:
        entries.inspection(request, progress)
    except (ModelRejected, DatasetRejected) as refusal:
        if len(refusal.detail) < 20 or str(request.scratch) in refusal.detail:
            return f"a poor sentence: {refusal.detail}"
        return "refused unforeseen" if "cannot be read as a" in refusal.detail else "refused"
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:200]}"
    return "loaded"
