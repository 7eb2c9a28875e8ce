"""A file reloaded from its bytes in its own runtime: what every figure of the report is measured on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch

from app.contract.errors import ArtifactUnverified
from app.contract.facts import ModelFacts, OutputKind
from app.contract.packed import Sizes
from app.contract.report import LayerReport
from worker.data.batch import Inputs
from worker.evaluation.layers import graph_layers, graph_parameters, module_layers
from worker.evaluation.macs import module_macs
from worker.evaluation.memory import Probe, Runtime, make_probe
from worker.evaluation.onnx_macs import graph_macs
from worker.loading.delivered import Reader, load_delivered
from worker.loading.heads import to_logits
from worker.loading.onnx_check import computes_in_half
from worker.loading.onnx_constants import flattened
from worker.loading.onnx_session import GraphSession


class Reloaded(Protocol):
    """Loaded and ready. Calling it gives logits [batch, classes] as float32."""

    runtime: Runtime
    path: Path
    output_kind: OutputKind

    def __call__(self, inputs: Inputs) -> np.ndarray: ...

    def outputs(self, inputs: Inputs) -> np.ndarray:
        """What the file itself gives, which may be probabilities."""

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
    output_kind: OutputKind = "logits"
    reader: Reader = "upload"

    def __init__(self, path: Path, filename: str, spec: dict[str, Any], scratch: Path, threads: int) -> None:
        self.path = path
        self._filename = filename
        self._spec = spec
        self._threads = threads
        torch.set_num_threads(threads)
        model = load_delivered(self.reader, path, filename, spec, fresh_folder(scratch))
        self.module = model.module.eval()
        self._stored = model.stored

    def __call__(self, inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            logits: torch.Tensor = self.module(*inputs)
        return logits.float().numpy()

    def outputs(self, inputs: Inputs) -> np.ndarray:
        return self(inputs)

    def parameters(self) -> tuple[int, int]:
        parameters = list(self.module.parameters())
        return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)

    def macs(self, sample: Inputs) -> int:
        return module_macs(self.module, sample)

    def layers(self) -> tuple[LayerReport, ...]:
        return module_layers(self.module, self._stored)

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        arrays = [tensor.numpy() for tensor in sample]
        probe = make_probe(self.path, self._filename, self._spec, arrays, scratch, self._threads)
        return replace(probe, reader=self.reader)


class CompressedFile(TorchFile):
    """A folder of transformers whose weights are codes; `bits` are those of each weight that is."""

    reader: Reader = "compressed-tensors"

    def __init__(self, path: Path, bits: Mapping[str, int], spec: dict[str, Any], scratch: Path, threads: int) -> None:
        super().__init__(path, path.name, spec, scratch, threads)
        self._bits = bits

    def layers(self) -> tuple[LayerReport, ...]:
        return tuple(
            layer.model_copy(update={"bits": self._bits.get(layer.name, layer.bits)}) for layer in super().layers()
        )


class OnnxFile:
    """An ONNX file in ONNX Runtime on the CPU. `reference` is the float file that gives what it should give, `floats`
    the one whose weights its integers stand for, if that is another.

    `graph` is where the graph lies with its weights inside, if `path` is an archive of it; `single` says that it can
    only take one sample at a time.
    """

    runtime: Runtime = "onnxruntime"

    def __init__(
        self,
        path: Path,
        reference: Path,
        facts: ModelFacts,
        threads: int,
        *,
        floats: Path | None = None,
        graph: Path | None = None,
        single: bool = False,
    ) -> None:
        self.path = path
        self._floats = floats or reference
        self.output_kind = facts.output_kind
        self._graph = graph or path
        self._reference = reference
        self._facts = facts
        self._threads = threads
        self._single = single
        try:
            names = [tensor.name for tensor in facts.inputs]
            self._session = GraphSession(self._graph, names, threads, single=single)
        except Exception as error:  # onnxruntime's errors share no base class below Exception
            raise ArtifactUnverified(f"{path.name} does not load in ONNX Runtime: {error}") from error

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return to_logits(self.output_kind, self._session(inputs))

    def outputs(self, inputs: Inputs) -> np.ndarray:
        return self._session(inputs).astype(np.float32)

    @property
    def half(self) -> bool:
        """Whether it computes in float16, so that its outputs are as coarse."""
        return computes_in_half(onnx.load(self._graph))

    def parameters(self) -> tuple[int, int]:
        return graph_parameters(flattened(onnx.load(self._graph)))

    def macs(self, sample: Inputs) -> int:
        return graph_macs(onnx.load(self._graph), self._session.feed(sample))

    def layers(self) -> tuple[LayerReport, ...]:
        return graph_layers(flattened(onnx.load(self._graph)), flattened(onnx.load(self._floats)))

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        arrays = list(self._session.feed(sample).values())
        return make_probe(self._graph, self.path.name, {}, arrays, scratch, self._threads)

    def float_reference(self) -> OnnxFile:
        """The float file, loaded the same way."""
        return OnnxFile(self._reference, self._reference, self._facts, self._threads, single=self._single)


class PackedFile:
    """A packed file, measured as what it unpacks to: `native` is a file of the upload's own format, loaded again."""

    def __init__(self, path: Path, native: TorchFile | OnnxFile, sizes: Sizes) -> None:
        self.path, self.native, self._sizes = path, native, sizes
        self.runtime: Runtime = native.runtime
        self.output_kind = native.output_kind

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return self.native(inputs)

    def outputs(self, inputs: Inputs) -> np.ndarray:
        return self.native.outputs(inputs)

    def parameters(self) -> tuple[int, int]:
        return self.native.parameters()

    def macs(self, sample: Inputs) -> int:
        return self.native.macs(sample)

    def layers(self) -> tuple[LayerReport, ...]:
        """With the bits that a weight takes here, its share of everything that was written for its tensor."""
        return tuple(
            layer.model_copy(update={"bits": 8 * self._sizes.tensors[layer.name] / layer.parameters})
            if layer.name in self._sizes.tensors
            else layer
            for layer in self.native.layers()
        )

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        return self.native.probe(sample, scratch)


def fresh_folder(scratch: Path) -> Path:
    """A folder of its own inside scratch: a loader that unpacks must not meet what another one unpacked."""
    return Path(tempfile.mkdtemp(dir=scratch, prefix="reload-"))
