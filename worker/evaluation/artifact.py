"""A file reloaded from its bytes in its own runtime: what every figure of the report is measured on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
import torch

from app.contract.errors import ArtifactUnverified
from app.contract.facts import ModelFacts
from app.contract.report import LayerReport
from worker.data.batch import Inputs
from worker.evaluation.layers import graph_layers, graph_parameters, module_layers
from worker.evaluation.macs import module_macs
from worker.evaluation.memory import Probe, Runtime
from worker.evaluation.onnx_macs import graph_macs
from worker.loading import load_model

CPU = ["CPUExecutionProvider"]


class Reloaded(Protocol):
    """Loaded and ready. Calling it gives logits [batch, classes] as float32."""

    runtime: Runtime
    path: Path

    def __call__(self, inputs: Inputs) -> np.ndarray: ...

    def parameters(self) -> tuple[int, int]:
        """How many parameters the file stores, and how many of them are not zero."""

    def macs(self, sample: Inputs) -> int:
        """Multiply-accumulates of one sample."""

    def layers(self) -> tuple[LayerReport, ...]:
        """The stored weights."""

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        """What a fresh process needs to know to measure the file's memory."""


class TorchFile:
    """An uploaded or native file, read by the loader that reads uploads."""

    runtime: Runtime = "torch"

    def __init__(self, path: Path, filename: str, spec: dict[str, Any], scratch: Path, threads: int) -> None:
        self.path = path
        self._filename = filename
        self._spec = spec
        self._threads = threads
        torch.set_num_threads(threads)
        model = load_model(path, filename, spec, fresh_folder(scratch))
        self.module = model.module.eval()
        self._stored = model.stored

    def __call__(self, inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            logits: torch.Tensor = self.module(*inputs)
        return logits.float().numpy()

    def parameters(self) -> tuple[int, int]:
        parameters = list(self.module.parameters())
        return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)

    def macs(self, sample: Inputs) -> int:
        return module_macs(self.module, sample)

    def layers(self) -> tuple[LayerReport, ...]:
        return module_layers(self.module, self._stored)

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        return _probe(self.path, self._filename, self._spec, sample, scratch, self._threads)


class OnnxFile:
    """An ONNX file in ONNX Runtime on the CPU. `reference` is the float file that its integers are judged against."""

    runtime: Runtime = "onnxruntime"

    def __init__(self, path: Path, reference: Path, facts: ModelFacts, threads: int) -> None:
        self.path = path
        self._reference = reference
        self._facts = facts
        self._names = [tensor.name for tensor in facts.inputs]
        self._threads = threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=CPU)
        except Exception as error:  # onnxruntime's errors share no base class below Exception
            raise ArtifactUnverified(f"{path.name} does not load in ONNX Runtime: {error}") from error

    def __call__(self, inputs: Inputs) -> np.ndarray:
        logits: np.ndarray = self._session.run(None, self._feed(inputs))[0]
        return logits

    def parameters(self) -> tuple[int, int]:
        return graph_parameters(onnx.load(self.path))

    def macs(self, sample: Inputs) -> int:
        return graph_macs(onnx.load(self.path), self._feed(sample))

    def layers(self) -> tuple[LayerReport, ...]:
        return graph_layers(onnx.load(self.path), onnx.load(self._reference))

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        return _probe(self.path, self.path.name, {}, sample, scratch, self._threads)

    def float_reference(self) -> OnnxFile:
        """The float file, loaded the same way."""
        return OnnxFile(self._reference, self._reference, self._facts, self._threads)

    def _feed(self, inputs: Inputs) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}


def fresh_folder(scratch: Path) -> Path:
    """A folder of its own inside scratch: a loader that unpacks must not meet what another one unpacked."""
    return Path(tempfile.mkdtemp(dir=scratch, prefix="reload-"))


def _probe(path: Path, filename: str, spec: dict[str, Any], sample: Inputs, scratch: Path, threads: int) -> Probe:
    folder = fresh_folder(scratch)
    arrays = folder / "inputs.npz"
    np.savez(arrays, *(tensor.numpy() for tensor in sample))
    return Probe(str(path), filename, spec, str(arrays), str(folder), threads)
