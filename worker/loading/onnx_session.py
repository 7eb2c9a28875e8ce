"""ONNX Runtime on the CPU: one graph, fed by the model's inputs in their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from worker.data.batch import Inputs

CPU = ("CPUExecutionProvider",)
_FATAL = 4  # what goes wrong is raised; the runtime would print it as well
# What the runtime calls the types that inputs are cast to.
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


def open_session(graph: bytes, threads: int) -> ort.InferenceSession:
    """A graph on the CPU, one operator at a time."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return ort.InferenceSession(graph, options, providers=list(CPU))


class GraphSession:
    """A loaded graph. Where its batch is fixed at 1, or `single` says so, it runs sample by sample.

    The runtime's errors, which share no class below Exception, pass.
    """

    def __init__(self, graph: bytes | Path, names: Sequence[str], threads: int, *, single: bool = False) -> None:
        self._session = open_session(graph.read_bytes() if isinstance(graph, Path) else graph, threads)
        declared = {value.name: value for value in self._session.get_inputs()}
        self._inputs = [(name, _TYPES[declared[name].type]) for name in names]
        self._output = self._session.get_outputs()[0].name
        self._single = single or any(declared[name].shape[:1] == [1] for name in names)

    def feed(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The inputs by name, in the types that the graph declares."""
        pairs = zip(self._inputs, inputs, strict=True)
        return {name: tensor.detach().cpu().numpy().astype(dtype, copy=False) for (name, dtype), tensor in pairs}

    def __call__(self, inputs: Inputs) -> np.ndarray:
        """The graph's first output."""
        batch = len(inputs[0])
        if self._single and batch != 1:
            rows = [self._run(tuple(tensor[i : i + 1] for tensor in inputs)) for i in range(batch)]
            return np.concatenate(rows)
        return self._run(inputs)

    def _run(self, inputs: Inputs) -> np.ndarray:
        output: np.ndarray = self._session.run([self._output], self.feed(inputs))[0]
        return output
