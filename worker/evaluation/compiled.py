"""A program of integers as torch.compile makes it: what it gains is kernels, which take a while to be made.

Run as `python -m worker.evaluation.compiled '<json>'` in a process of its own, which can be ended when it takes too
long; prints the medians as JSON. The compiler's files stay in the job's scratch folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worker.evaluation.memory import Probe, torch_inputs, torch_loader
from worker.limits import memory_of
from worker.vetting.boundary import first_line

log = logging.getLogger("tersor.job")

COMPILERS = ("g++", "clang++")  # of which torch's compiler calls one
LIMIT_S = 150  # compiling a network of the size of a ResNet-18 takes half a minute, one of many kinds of layers more
BUDGET_S = 3.0
NEEDED_BYTES = 1536 << 20  # by torch, its compiler and one of C++, beside the program
COPIES = 3  # of the program: loaded, as constants of what is compiled, and packed for its kernels
MOST_SAID = 200  # letters of what went wrong


@dataclass(frozen=True)
class Compiled:
    """Medians in seconds of one sample, taken in turns: compiled, the same program as it is, and the upload where torch
    runs that; and how long it took to compile."""

    median_s: float
    eager_s: float
    uploaded_s: float | None
    compile_s: float


def measure_compiled(
    program: Probe, uploaded: Probe | None, memory_bytes: int | None = None, limit_s: float = LIMIT_S
) -> Compiled | str:
    """What compiling a program is worth, or why that is not known, as half a sentence. `memory_bytes` is what the
    process that asks and the one that compiles may take together; None: nobody set a limit."""
    needed = NEEDED_BYTES + COPIES * Path(program.path).stat().st_size
    if memory_bytes is not None and memory_of(os.getpid()).own + needed > memory_bytes:
        return f"compiling would take more memory than the {memory_bytes >> 20} MiB that a job has on this worker"
    if not any(map(shutil.which, COMPILERS)):
        return f"this worker has no C++ compiler ({' or '.join(COMPILERS)})"
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
        log.warning("The process that compiles a program ended with %s: %s", process.returncode, complaints[-2000:])
        return "the process that compiles it ended before its time"
    found = json.loads(said.splitlines()[-1])
    return f"this worker could not compile it ({found['failed']})" if "failed" in found else Compiled(**found)


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


def answer(argument: str) -> dict[str, Any]:
    """What `main` gives, or the first line of what it failed by."""
    try:
        return main(argument)
    except Exception as failure:  # torch's compiler raises errors of every class, with pages of advice
        return {"failed": first_line(failure)[:MOST_SAID]}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(answer(sys.argv[1])))
