"""Peak memory of an artifact: a fresh process imports the runtime alone, loads the file and runs it.

Run as `python -m worker.evaluation.memory '<json>'`; prints the peak resident bytes above the bare runtime. Nothing but
the standard library is imported before the runtime is known, so that an ONNX file is not charged for torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from app.contract.errors import ArtifactUnverified

RUNS = 3  # the first allocates, the others show what stays
HANG_GUARD_S = 600
KIB = 1024


Runtime = Literal["torch", "onnxruntime"]


@dataclass(frozen=True)
class Probe:
    """One file to measure. `inputs` is an .npz with the arrays of one sample, in the model's order; `reader` is that of
    `worker.loading.delivered`, for torch."""

    path: str
    filename: str
    spec: dict[str, Any]
    inputs: str
    scratch: str
    threads: int
    reader: str = "upload"


def make_probe(
    path: Path,
    filename: str,
    spec: dict[str, Any],
    sample: Sequence[Any],
    scratch: Path,
    threads: int,
    reader: str = "upload",
) -> Probe:
    """A probe in a folder of its own inside scratch; `sample` are arrays of NumPy."""
    import numpy as np

    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="reload-"))
    arrays = folder / "inputs.npz"
    np.savez(arrays, *sample)
    return Probe(str(path), filename, spec, str(arrays), str(folder), threads, reader)


def peak_memories(runtime: Runtime, probes: Sequence[Probe]) -> list[int]:
    """Bytes of resident memory that loading and running each file takes at its peak, above the bare runtime.

    Raises ArtifactUnverified where a file does not load or run in a fresh process.
    """
    argument = json.dumps([runtime, [asdict(probe) for probe in probes]])
    done = subprocess.run(
        [sys.executable, "-m", "worker.evaluation.memory", argument],
        capture_output=True,
        text=True,
        timeout=HANG_GUARD_S,
        env=os.environ | {"OMP_NUM_THREADS": str(max(probe.threads for probe in probes))},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if done.returncode != 0:
        names = ", ".join(probe.filename for probe in probes)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ArtifactUnverified(f"{names} did not run in a fresh process: {reason}")
    return [int(line) for line in done.stdout.split()]


def main(argument: str) -> list[int]:
    """The fresh process: imports all that the runtime needs, then measures every file in a fork of its own."""
    runtime, probes = json.loads(argument)
    prepare = _onnxruntime if runtime == "onnxruntime" else torch_loader
    found = []
    for probe in probes:
        load = prepare(Probe(**probe))
        _import(json.loads(_in_a_fork(lambda load=load: json.dumps(imports(load)))))  # type: ignore[misc]
        found.append(int(_in_a_fork(lambda load=load: str(measure(load)))))  # type: ignore[misc]
    return found


def imports(load: Callable[[], Callable[[], object]]) -> list[str]:
    """The modules that loading and running a file imports, in their order.

    A runtime imports much of itself when it is first used. That belongs to the runtime and not to the file: a first
    fork tells which modules these are, and they are imported before the baseline of the second is taken.
    """
    before = set(sys.modules)
    load()()
    return [name for name in sys.modules if name not in before]


def _import(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # some modules are made while the program runs, and have no file
            importlib.import_module(name)


def _in_a_fork(task: Callable[[], str]) -> str:
    """What a task says in a child that shares the runtime with this process and nothing else."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(writer, "w") as pipe:
                pipe.write(task())
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        os._exit(status)  # no exit handlers of the runtime, which belong to the parent
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(1)
    return answer


def measure(load: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which loading and a few runs raise the resident memory of this process at their peak.

    In a process that was just forked: its peak starts at its present size (Linux), so that what its parent's imports
    took at theirs does not count.
    """
    bare = _status("VmRSS")
    run = load()
    for _ in range(RUNS):
        run()
    return max(0, _status("VmHWM") - bare)


def _onnxruntime(probe: Probe) -> Callable[[], Callable[[], object]]:
    import numpy as np
    import onnxruntime as ort

    def load() -> Callable[[], object]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = probe.threads
        session = ort.InferenceSession(probe.path, options, providers=["CPUExecutionProvider"])
        with np.load(probe.inputs) as arrays:
            names = [value.name for value in session.get_inputs()]
            feed = dict(zip(names, (arrays[key] for key in arrays.files), strict=True))
        return lambda: session.run(None, feed)

    return load


def torch_loader(probe: Probe) -> Callable[[], Callable[[], object]]:
    """Loads a file in torch; what that gives runs it once."""
    import torch

    from worker.loading.delivered import load_module

    torch.set_num_threads(probe.threads)

    def load() -> Callable[[], object]:
        scratch = Path(tempfile.mkdtemp(dir=probe.scratch))  # what an earlier fork unpacked is in the way
        module = load_module(probe.reader, Path(probe.path), probe.filename, probe.spec, scratch)  # type: ignore[arg-type]
        inputs = torch_inputs(probe)

        def run() -> object:
            with torch.inference_mode():
                return module(*inputs)

        return run

    return load


def torch_inputs(probe: Probe) -> list[Any]:
    """The sample as tensors of torch."""
    import numpy as np
    import torch

    with np.load(probe.inputs) as arrays:
        return [torch.from_numpy(arrays[key]) for key in arrays.files]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    sys.stdout.write("\n".join(map(str, main(sys.argv[1]))))
