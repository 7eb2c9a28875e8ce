"""A torch module to a float ONNX file: one file, weights inside, free dimensions kept, weights traceable by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from app.contract.errors import ExportFailed
from worker.export.names import rename_dimensions, rename_weights
from worker.export.quiet import quiet
from worker.export.strip import strip
from worker.loading.heads import delivering
from worker.model import Model

# 20 is the first with Gelu as one operator, and what ONNX Runtime >= 1.17, OpenVINO >= 2024 and TensorRT >= 10 read.
OPSET = 20
# A protobuf message cannot be longer, and weights are never put beside the file.
MAX_BYTES = (1 << 31) - (1 << 24)
# Any batch but 1, which the exporter would take for a constant.
EXAMPLE_BATCH = 2


def export_onnx(module: nn.Module, model: Model, path: Path) -> Path:
    """Writes `module`, which has the structure of `model.module` and no parametrizations, as float ONNX.

    Inputs are named as in the model's facts, the output as in `model.output_name`; the batch and the dimensions that
    the facts leave open stay open. Weights carry their names in the state dict. An uploaded ONNX graph that torch does
    not export again is written as it is, with the module's weights. Raises ExportFailed where the exporter gives up.
    """
    check_size(module)
    module = module.cpu().eval()
    proto = _graph(module, model)
    strip(proto)
    rename_weights(proto, module.state_dict())
    rename_dimensions(proto, model.facts)
    onnx.save_model(proto, str(path), save_as_external_data=False)
    return path


def _graph(module: nn.Module, model: Model) -> onnx.ModelProto:
    """The module by torch's exporter, else the upload's own graph, if it has one."""
    # torch's exporter takes the number of steps of a recurrent layer for a constant. A graph in float16, on the other
    # hand, could not be quantized.
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules()) and not model.stored
    if model.graph is not None and (recurrent or not model.facts.trainable):
        return model.graph(module)
    try:
        return _exported(module, model)
    except ExportFailed:
        if model.graph is None:
            raise
        return model.graph(module)


def _exported(module: nn.Module, model: Model) -> onnx.ModelProto:
    names = [tensor.name for tensor in model.facts.inputs]
    try:
        with quiet(), torch.no_grad(), delivering(module):
            proto = _to_proto(module, model, names)
    except Exception as error:
        # The exporter wraps what went wrong in a page of advice.
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ExportFailed(f"torch could not export the model to ONNX: {' '.join(reason[:2])}") from error
    _check_open(proto, model)
    return proto


def check_size(module: nn.Module) -> None:
    """Raises ExportFailed where the weights, which are float32, cannot fit one ONNX file; asked before any step too."""
    distinct = {
        tensor.data_ptr(): tensor.nbytes for tensor in module.state_dict().values()
    }  # tied ones are written once
    size = sum(distinct.values())
    if size > MAX_BYTES:
        raise ExportFailed(
            f"The model's weights take {size} bytes; an ONNX file that holds its weights ends at {MAX_BYTES}. "
            "Export native instead."
        )


def _to_proto(module: nn.Module, model: Model, names: list[str]) -> onnx.ModelProto:
    example = tuple(tensor.clone() for tensor in model.example(batch=EXAMPLE_BATCH))
    shapes: tuple[Any, ...] = tuple(
        dict.fromkeys(open_axes(tensor.shape), torch.export.Dim.DYNAMIC) for tensor in model.facts.inputs
    )
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # forward(*inputs) takes them as one argument
        shapes = (shapes,)
    program = torch.onnx.export(
        module,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=names,
        output_names=[model.output_name],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def open_axes(shape: Sequence[int | None]) -> list[int]:
    """The axes of an input that may vary: the batch, and those whose size the facts leave open."""
    return [0, *(axis for axis, size in enumerate(shape, start=1) if size is None)]


def _check_open(proto: onnx.ModelProto, model: Model) -> None:
    """Raises ExportFailed where tracing turned a dimension that may vary into a constant."""
    for value, tensor in zip(proto.graph.input, model.facts.inputs, strict=True):
        dimensions = value.type.tensor_type.shape.dim
        for axis in open_axes(tensor.shape):
            dimension = dimensions[axis]
            if not dimension.dim_param:
                raise ExportFailed(
                    f"The model's code fixes dimension {axis} of input {tensor.name!r} at {dimension.dim_value}, "
                    "which has to stay open."
                )


def takes_single_samples(path: Path) -> bool:
    """Whether the file fixes the batch of an input at 1, as an uploaded graph may."""
    inputs = onnx.load(path).graph.input
    return any(value.type.tensor_type.shape.dim[0].dim_value == 1 for value in inputs)
