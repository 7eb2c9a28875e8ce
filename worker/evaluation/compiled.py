"""A program of integers as torch.compile makes it: what it gains is kernels, which take a while to be made.

Run as `python -m worker.evaluation.compiled '<json>'` in a process of its own, which can be ended when it takes too
long; prints the medians as JSON. The compiler's files stay in the job's scratch folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worker.evaluation.memory import Probe, torch_inputs, torch_loader

LIMIT_S = 150  # compiling a network of the size of a ResNet-18 takes half a minute, one of many kinds of layers more
BUDGET_S = 3.0


@dataclass(frozen=True)
class Compiled:
    """Medians in seconds of one sample, taken in turns: compiled, the same program as it is, and the upload where torch
    runs that; and how long it took to compile."""

    median_s: float
    eager_s: float
    uploaded_s: float | None
    compile_s: float


def measure_compiled(program: Probe, uploaded: Probe | None, limit_s: float = LIMIT_S) -> Compiled | str:
    """What compiling a program is worth, or why that is not known, as half a sentence."""
    argument = json.dumps([asdict(program), None if uploaded is None else asdict(uploaded)])
    folder = Path(program.scratch) / "compiled"
    own = {"OMP_NUM_THREADS": str(program.threads), "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.evaluation.compiled", argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # no pool of processes that would outlive it
        cwd=Path(__file__).parents[2],
    )
    try:
        said, complaints = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"compiling took longer than {limit_s:g} s on this worker"
    if process.returncode != 0:
        lines = [line for line in complaints.strip().splitlines() if line.strip()]
        return f"this worker could not compile it ({lines[-1].strip()[:200] if lines else process.returncode})"
    return Compiled(**json.loads(said.splitlines()[-1]))


def main(argument: str) -> dict[str, Any]:
    """The fresh process."""
    import torch
    from torch._inductor import config as inductor

    from worker.evaluation.latency import measure_in_turns
    from worker.loading.delivered import load_module

    program, uploaded = (None if one is None else Probe(**one) for one in json.loads(argument))
    assert program is not None
    torch.set_num_threads(program.threads)
    module = load_module("program", Path(program.path), program.filename, {}, Path(program.scratch))
    inputs = torch_inputs(program)
    began = time.perf_counter()
    inductor.freezing = True  # without it weights are no constants, and become floats at each call
    fast = torch.compile(module)
    with torch.no_grad():
        fast(*inputs)
        spent = time.perf_counter() - began
        rivals = {"compiled": lambda: fast(*inputs), "eager": lambda: module(*inputs)}
        if uploaded is not None:
            rivals["uploaded"] = torch_loader(uploaded)()
        found = measure_in_turns(rivals, batch_size=1, threads=program.threads, budget_s=BUDGET_S)
    medians = {name: one.median_s for name, one in found.items()}
    made = Compiled(medians["compiled"], medians["eager"], medians.get("uploaded"), spent)
    return asdict(made)


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1])))
