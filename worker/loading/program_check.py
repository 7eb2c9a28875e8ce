"""A program run on shapes alone, before it runs on numbers: a few sizes in a file can ask for any amount of memory."""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from app.contract.errors import ModelRejected
from worker.data.batch import Inputs
from worker.export.quiet import hushed
from worker.vetting.boundary import first_line
from worker.vetting.demand import EXAMPLES, MAX_SAMPLE_BYTES

MAX_ACTIVATION_BYTES = EXAMPLES * MAX_SAMPLE_BYTES  # of one operation
MAX_SIZE = 1 << 62  # of a number that sizes are computed with; more would only keep the processor busy
MAX_EXPONENT = 64


def check_sizes(module: fx.GraphModule, inputs: Inputs) -> None:
    """Raises ModelRejected, naming the operation, where one fails on these shapes or gives too large a tensor."""
    runner = _Bounded(module)
    try:
        # torch logs the traceback of what it also raises.
        unlogged = hushed("torch._subclasses.fake_tensor", logging.CRITICAL)
        with unlogged, FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            runner.run(*(mode.from_tensor(tensor) for tensor in inputs))
    except Exception as failure:  # operators raise errors of every class
        raise ModelRejected(
            f"The program fails at its operation {runner.at}: {first_line(failure)} Does it run on a batch of "
            f"{len(inputs[0])}? A size that was fixed by the export cannot vary."
        ) from failure


class _Bounded(fx.Interpreter):
    """Runs a graph node by node and looks at what each gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.at = ""

    def run_node(self, n: fx.Node) -> Any:
        self.at = f"{n.name} ({n.target})"
        result = super().run_node(n)
        for value in result if isinstance(result, list | tuple) else (result,):
            _check(value)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.pow and not -MAX_EXPONENT <= args[1] <= MAX_EXPONENT:
            raise OverflowError(f"a power of {args[1]}")
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(str(target))
        if isinstance(layer, nn.RNNBase):
            return _recurrent(layer, *args)
        return super().call_module(target, args, kwargs)


def _check(value: Any) -> None:
    if isinstance(value, Tensor) and (size := value.numel() * value.itemsize) > MAX_ACTIVATION_BYTES:
        raise MemoryError(
            f"its output {list(value.shape)} takes {size} bytes; at most {MAX_ACTIVATION_BYTES} are taken."
        )
    if isinstance(value, int) and abs(value) > MAX_SIZE:
        raise OverflowError("a size beyond 64 bits.")


def _recurrent(layer: nn.RNNBase, inputs: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """What a recurrent layer gives; torch would walk every step."""
    if inputs.ndim != 3 or inputs.shape[-1] != layer.input_size:
        raise ValueError(f"expected [batch, steps, {layer.input_size}], got {list(inputs.shape)}.")
    features = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    return inputs.new_empty((*inputs.shape[:2], features)), *states
