"""An exported program, loaded again by torch alone, and the weights that it really stores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from app.contract.errors import ArtifactUnverified
from app.contract.facts import ModelFacts
from app.contract.report import LayerReport
from worker.data.batch import Inputs
from worker.evaluation.layers import module_layers, weight_report
from worker.evaluation.macs import module_macs
from worker.evaluation.memory import Probe, Runtime, make_probe
from worker.export.program import open_program
from worker.loading.heads import to_logits
from worker.techniques.quantization.coded_layers import Coded
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.program_int8 import Source
from worker.techniques.quantization.stored import MIN_WEIGHT_DIMENSIONS, StoredWeight, along, stored_weights

_PER_CHANNEL, _PER_TENSOR = (
    getattr(torch.ops.quantized_decomposed, f"dequantize_per_{what}").default for what in ("channel", "tensor")
)
# What may lie between stored integers and what makes floats of them: a lookup, or a dimension more.
_LOOKUP, _UNSQUEEZE = torch.ops.aten.embedding.default, torch.ops.aten.unsqueeze.default
_ZERO_POINT = 2  # the argument behind the values and the steps


class ProgramFile:
    """A program in torch, run operator by operator as torch runs it unless it is told to compile.

    `integers` is the int8 graph that the program was made of, `sources` which weight of it each of the program's
    integers is; `coded` are weights of few bits. Raises ArtifactUnverified where the file does not load, or stores a
    weight that should be integers as floats.
    """

    runtime: Runtime = "torch"

    def __init__(
        self,
        path: Path,
        facts: ModelFacts,
        threads: int,
        integers: Int8Graph | None = None,
        sources: Mapping[str, Source] | None = None,
        coded: Mapping[str, Coded] | None = None,
    ) -> None:
        self.path, self.output_kind, self.integers = path, facts.output_kind, integers
        self.input_names = [tensor.name for tensor in facts.inputs]
        self._threads = threads
        torch.set_num_threads(threads)
        try:
            self.program = open_program(path)
        except Exception as error:  # torch's reader raises errors of every class
            raise ArtifactUnverified(f"{path.name} does not load in torch: {error}") from error
        self.module = _tied(self.program.module())
        self._weights = {weight.name: weight for weight in integer_weights(self.program)}
        self._sources = self._told(sources or {})
        if self._weights.keys() != self._sources.keys():
            wrong = sorted(self._weights.keys() ^ self._sources.keys())[:5]
            raise ArtifactUnverified(f"{path.name} should store {', '.join(wrong)} as int8, and nothing else.")
        self.coded = coded or {}
        try:
            self._few_bits = {name: own.read(name, self.program.state_dict) for name, own in self.coded.items()}
        except KeyError as missing:
            raise ArtifactUnverified(f"{path.name} should store {missing} in few bits, and does not.") from missing

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return to_logits(self.output_kind, self.outputs(inputs))

    def outputs(self, inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            found: Tensor = self.module(*inputs)
        return found.float().numpy()

    def parameters(self) -> tuple[int, int]:
        floats = [tensor for name, tensor in self.module.named_parameters() if name not in self._weights]
        integers = {values.ctypes.data: weight for weight in self._weights.values() for values in [weight.values]}
        stored = [*integers.values(), *self._few_bits.values()]
        total = sum(tensor.numel() for tensor in floats) + sum(weight.size for weight in stored)
        nonzero = sum(int(tensor.count_nonzero()) for tensor in floats)
        return total, nonzero + sum(weight.size - weight.zeros() for weight in stored)

    def macs(self, sample: Inputs) -> int:
        return module_macs(self.module, sample)

    def layers(self) -> tuple[LayerReport, ...]:
        """Integers against the floats that they stand for, under the names that those have."""
        floats = [one for one in module_layers(self.module, {}) if one.name not in self._weights]
        few_bits = (
            weight_report(weight, None).model_copy(update={"shape": self.coded[name].shape})
            for name, weight in self._few_bits.items()
        )
        return (*floats, *self._of_integers(), *few_bits)

    def twins(self) -> list[str]:
        """The floating tensors that hold what integers or codes of the file stand for: stored twice."""
        return float_twins(self.program, [*self._weights.values(), *self._few_bits.values()])

    def _told(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        """The sources by the names under which integers are read: of several that one tensor has torch takes one."""
        tensors = {**self.program.state_dict, **self.program.constants}
        read = {weight.values.ctypes.data: name for name, weight in self._weights.items()}
        places = {name: tensors[name].data_ptr() for name in sources if name in tensors}
        return {read.get(places.get(name, 0), name): source for name, source in sources.items()}

    def _of_integers(self) -> Iterator[LayerReport]:
        if self.integers is None:
            return
        originals = {weight.name: weight.values for weight in stored_weights(onnx.load(self.integers.floats))}
        for name, weight in self._weights.items():
            source = self._sources[name]
            original = originals.get(source.weight)
            if original is not None and source.transposed:
                original = original.T
            yield weight_report(weight, original).model_copy(update={"name": source.weight})

    def probe(self, sample: Inputs, scratch: Path) -> Probe:
        arrays = [tensor.numpy() for tensor in sample]
        return make_probe(self.path, self.path.name, {}, arrays, scratch, self._threads, reader="program")


def integer_weights(program: ExportedProgram) -> Iterator[StoredWeight]:
    """Every weight that a program stores as integers, once, with the steps that it is read with."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    tensors = {**program.state_dict, **program.constants}
    seen: set[str] = set()

    def held(node: object) -> str | None:
        name = names.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None
        return name if name in tensors else None

    for node in program.graph.nodes:
        if node.target not in (_PER_CHANNEL, _PER_TENSOR):
            continue
        values = node.args[0]
        through = isinstance(values, fx.Node) and values.target in (_LOOKUP, _UNSQUEEZE)
        name = held(values.args[0] if through else values)
        if name is None or name in seen:
            continue
        seen.add(name)
        codes = tensors[name].numpy()
        if node.target is _PER_TENSOR:
            scale, zero_point = np.array(node.args[1], np.float32), np.array(node.args[_ZERO_POINT])
            yield StoredWeight(name, codes, scale=scale, zero_point=zero_point)
            continue
        scale, zero_point = (tensors[held(one) or ""].numpy() for one in node.args[1 : _ZERO_POINT + 1])
        axis = node.args[_ZERO_POINT + 1]
        yield StoredWeight(name, codes, scale=along(scale, codes, axis), zero_point=along(zero_point, codes, axis))


def float_twins(program: ExportedProgram, weights: Iterable[StoredWeight]) -> list[str]:
    """The floating tensors of a program that hold what these weights stand for: stored twice."""
    exact = set()
    for weight in weights:
        floats = weight.dequantized()
        exact |= {_key(floats), _key(floats.T)}
    if not exact:
        return []
    return [
        name
        for name, tensor in program.state_dict.items()
        if tensor.is_floating_point()
        and tensor.ndim >= MIN_WEIGHT_DIMENSIONS
        and _key(tensor.detach().float().numpy()) in exact
    ]


def _key(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).digest()


def _tied(module: nn.Module) -> nn.Module:
    """What has several names in a program and lies in one place is one weight: torch makes a parameter of each name."""
    found: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], nn.Parameter] = {}
    for owner in module.modules():
        for name, own in owner._parameters.items():
            if own is not None:
                key = (own.data_ptr(), own.shape, own.stride(), own.dtype)
                owner._parameters[name] = found.setdefault(key, own)
    return module
