"""The Model: a trainable torch module, how to feed it, and how to write it back in the format it came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import torch
from torch import nn

from app.contract.facts import ModelFacts
from app.contract.spec import ExportFormat
from worker.data.base import RawBatch
from worker.data.batch import Inputs
from worker.objectives.base import Task

# Stands in for a dimension that may vary where an example input is needed.
EXAMPLE_LENGTH = 32


class WeightHolder(nn.Module):
    """A weight that something other than torch computes with; `kind` is what torch calls such a layer.

    `inputs_first` where the weight has a row for each input rather than for each output.
    """

    def __init__(self, weight: nn.Parameter, kind: str, inputs_first: bool = False) -> None:
        super().__init__()
        self.inputs_first = inputs_first
        self.weight = weight
        self.kind = kind


Save = Callable[[nn.Module, Path], Path]
Dtypes = Mapping[str, torch.dtype]
"""Of floating tensors, by their names in the state dict."""


class Plan(Protocol):
    """What a network was built of."""

    @property
    def described(self) -> Literal["architecture", "config"]:
        """In which words: layers, or a config of transformers."""


@dataclass(frozen=True)
class Model:
    """A loaded model.

    `module(*inputs)` gives one tensor, whose meaning is the `task`'s. `encode` turns raw samples into `Inputs`.
    `save(module, folder)` writes a module of the same structure in the upload's own format and returns the file; the
    module must be free of parametrizations (`worker.constraints.baked`). `stored` is the dtype of each floating tensor
    in that file, by its name in the state dict; one that is not named is stored as the module has it. `graph` gives the
    upload's own ONNX graph with a module's weights under their names, where the upload is one; `output_name` is what
    an ONNX file's output is called. `spec` is what reads a file of `save`, where that is not the upload's spec. `plan`
    can build another network of the same kind, where one can be described. `casts` are the dtypes that a step has asked
    for in the place of `stored`, and `saving` gives a `save` that keeps to such; None where the format cannot.
    `native_as` is the artifact that stands in for the upload's own format, where that cannot say what the network is.
    """

    module: nn.Module
    facts: ModelFacts
    encode: Callable[[RawBatch], Inputs]
    save: Save
    task: Task
    stored: Dtypes = field(default_factory=dict)
    example_length: int = EXAMPLE_LENGTH
    graph: Callable[[nn.Module], onnx.ModelProto] | None = None
    output_name: str = "logits"
    spec: Mapping[str, Any] | None = None
    plan: Plan | None = None
    casts: Dtypes = field(default_factory=dict)
    saving: Callable[[Dtypes], Save] | None = None
    native_as: ExportFormat | None = None

    @property
    def dtypes(self) -> Dtypes:
        """As what artifacts store tensors that are not stored as the module has them."""
        return {**self.stored, **self.casts}

    def round_as_stored(self, module: nn.Module) -> nn.Module:
        """Rounds the weights of `module` to what the file can hold of them, in place, and returns the module.

        Everything is computed in float32, also where the upload is float16 or bfloat16: after a training the weights
        lie between the values that its file has.
        """
        dtypes = self.dtypes
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                dtype = dtypes.get(name, tensor.dtype)
                if tensor.is_floating_point() and dtype != tensor.dtype:
                    tensor.copy_(tensor.to(dtype))
        return module

    def example(self, batch: int = 1, seed: int = 0, length: int | None = None) -> Inputs:
        """Inputs of the right shapes and dtypes: normal noise for floats, ones (valid ids and masks) for integers.

        Open dimensions are `length` long, or as long as is known to work.
        """
        generator = torch.Generator().manual_seed(seed)
        made = []
        for tensor in self.facts.inputs:
            shape = [batch, *((length or self.example_length) if d is None else d for d in tensor.shape)]
            dtype: torch.dtype = getattr(torch, tensor.dtype)
            if dtype.is_floating_point:
                made.append(torch.randn(shape, generator=generator, dtype=dtype))
            else:
                made.append(torch.ones(shape, dtype=dtype))
        return tuple(made)
