"""What every loader finds out about a module: its weighted layers, and that its output is what its task says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from app.contract.errors import ModelRejected
from app.contract.facts import LayerFacts, Task
from worker.data.batch import Inputs


def layer_facts(module: nn.Module) -> tuple[LayerFacts, ...]:
    """One entry a weight: of `.weight`, or for recurrent and attention layers of each `weight_…` and `…_weight`."""
    return tuple(_layers(module))


def _layers(module: nn.Module) -> Iterator[LayerFacts]:
    for prefix, layer in module.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        for name, weight in parameters.items():
            if "weight" not in name:
                continue
            own = [prefix] if name == "weight" else [prefix, name]
            bias = parameters.get(name.replace("weight", "bias"))
            yield LayerFacts(
                name=".".join(part for part in own if part),
                type=type(layer).__name__,
                shape=tuple(weight.shape),
                parameters=weight.numel() + (0 if bias is None else bias.numel()),
            )


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raises ModelRejected, naming the tensor, where a weight is NaN or infinite."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)  # torch asks no float8
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise ModelRejected(
                f"Tensor {name!r} holds {count} NaN or infinite values of {tensor.numel()}. "
                "Nothing can be compressed well from there: upload weights that are finite."
            )


# What a task's output looks like behind the batch; None where any shape will do.
_ROW, _SEQUENCE = ("classes",), ("steps", "classes")
OUTPUTS: dict[Task, tuple[str, ...] | None] = {
    "image-classification": _ROW,
    "text-classification": _ROW,
    "audio-classification": _ROW,
    "multi-label": _ROW,
    "sentence-embedding": ("dimensions",),
    "token-classification": _SEQUENCE,
    "causal-lm": _SEQUENCE,
    "masked-lm": _SEQUENCE,
    "speech-recognition": _SEQUENCE,
    "regression": None,
}


def check_forward(module: nn.Module, task: Task, example: Inputs, single: Inputs, labels: int | None) -> int:
    """Runs batches of 2 and 1 and returns the size of the output's last dimension: the number of classes.

    Raises ModelRejected unless the output is one tensor of finite floats in the task's shape, with one class a label.
    """
    module.eval()
    with torch.no_grad():
        outputs = [module(*inputs) for inputs in (example, single)]
    for output, batch in zip(outputs, (2, 1), strict=True):
        _check_output(output, batch, task)
    classes = int(outputs[0].shape[-1])
    if labels is not None and classes != labels:
        raise ModelRejected(
            f"The model has {classes} outputs and the spec names {labels} labels: give one label a class.",
            pointer="/labels",
        )
    return classes


def _check_output(output: object, batch: int, task: Task) -> None:
    wanted = OUTPUTS[task]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ModelRejected("The model's output is not one tensor of floating-point numbers.")
    if output.ndim < 2 or len(output) != batch or (wanted is not None and output.ndim != 1 + len(wanted)):
        shape = ", ".join((str(batch), *(wanted or ("…",))))
        hint = " End the network with Flatten and Linear, or pool the remaining dimensions." if wanted == _ROW else ""
        raise ModelRejected(
            f"A batch of {batch} gives an output of shape {list(output.shape)}; a {task} model gives [{shape}].{hint}"
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelRejected("The model's output for a plain input is NaN or infinite; the weights are not usable.")
