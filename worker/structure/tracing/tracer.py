"""A pass of a network in which every channel carries a label: what is computed with what, in any code that torch runs.

Nothing is told about layers. Labels are given to the entries of every parameter along each of its dimensions; an
operator moves labels as it moves numbers, or says which have to be the same for its result to exist without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from worker.structure.tracing.classes import NONE, Classes
from worker.structure.tracing.labels import Carried, Labels, Layout, Weight, spread


@dataclass
class Trace:
    """What a labelled pass has found: the labels of each parameter and buffer, dimension by dimension; of these, which
    are along what a product gives (`made`)."""

    classes: Classes = field(default_factory=Classes)
    weights: dict[str, Weight] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)


Rule = Callable[["Tracer", tuple[Any, ...], dict[str, Any], Any], None]
"""Called behind an operator with its arguments and what it gave."""


class Tracer(TorchDispatchMode):
    """Sees every operator of a pass, and what its tensors carry."""

    def __init__(self, trace: Trace, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.trace, self.classes = trace, trace.classes
        self.layout = Layout(trace.classes)
        self.operator = ""
        self.given: dict[str, Any] = {}
        self._rules = rules
        self._carried: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(self.of(one) is not None for one in tensors((args, kwargs))):
            self.operator = func._schema.name.removeprefix("aten::")
            self.given = _named(func, args, kwargs)
            rule = self._rules.get(self.operator, unknown)
            if torch.Tag.pointwise in func.tags and self.operator not in self._rules:
                rule = self._rules["pointwise"]
            rule(self, args, kwargs, out)
        return out

    def of(self, tensor: Any) -> Carried:
        """What a tensor carries; None of what is no tensor."""
        found: Carried = self._carried.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def give(self, tensor: Tensor, carried: Carried) -> None:
        """Lets a tensor carry what it does from now on; labels that are all NONE are nothing."""
        if carried is None or (isinstance(carried, Tensor) and not bool((carried != NONE).any())):
            self._carried.pop(tensor, None)
        else:
            self._carried[tensor] = carried

    def labels(self, tensor: Any) -> Labels | None:
        """Of a tensor that is computed with; a parameter becomes one."""
        found = self.of(tensor)
        return self.layout.activation(found, self.why) if isinstance(found, Weight) else found

    @property
    def why(self) -> str:
        """For what an operator wants to stay."""
        return f"{self.operator} needs all of it"

    def freeze(self, *carried: Carried) -> None:
        """Keeps all of it whole, because of the operator at hand."""
        for one in carried:
            for labels in one.dims if isinstance(one, Weight) else [one]:
                if labels is not None:
                    self.classes.freeze(labels, self.why)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """An operator's arguments by name, with those that are usual."""
    names = [own.name for own in func._schema.arguments]
    usual = {own.name: own.default_value for own in func._schema.arguments if own.has_default_value()}
    return usual | dict(zip(names, args, strict=False)) | kwargs


def unknown(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """An operator of which nothing is known: all that comes in stays."""
    tracer.freeze(*(tracer.of(one) for one in tensors((args, kwargs))))
    for one in tensors(out):
        tracer.give(one, None)


def tensors(arguments: Any) -> list[Tensor]:
    """Those in nested arguments."""
    return [one for one in tree_flatten(arguments)[0] if isinstance(one, Tensor)]


def replaced(arguments: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested arguments with other tensors."""
    return tree_map(lambda one: change(one) if isinstance(one, Tensor) else one, arguments)


def trace(module: nn.Module, run: Callable[[Tracer], Any], rules: Mapping[str, Rule]) -> Trace:
    """One pass in eval mode, which `run` takes. What it returns stays whole. Raises what the network raises."""
    found = Trace()
    tracer = Tracer(found, rules)
    for name, own in _followed(module):
        found.weights[name] = weight = Weight(tuple(found.classes.new(size) for size in own.shape))
        tracer.give(own, weight)
    with _plainly(module), _first_states(module, tracer), tracer:
        outputs = run(tracer)
    for out in tensors(outputs):
        carried = tracer.of(out)
        for labels in carried.dims if isinstance(carried, Weight) else [carried]:
            if labels is not None:
                found.classes.freeze(labels, "the network gives it out")
    tracer.layout.settle()
    return found


def _followed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the statistics of norms; other buffers are constants."""
    yield from module.named_parameters()
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            for name in ("running_mean", "running_var"):
                if (own := layer._buffers.get(name)) is not None:
                    yield f"{path}.{name}".lstrip("."), own


@contextmanager
def _first_states(module: nn.Module, tracer: Tracer) -> Iterator[None]:
    """The zeros that recurrent layers begin with where nothing is given, as channels: these are as many as a layer has
    units, in all of its directions and of the layers in it."""

    def give(layer: nn.RNNBase, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return args
        batch = args[0].shape[0 if layer.batch_first else 1]
        units = tracer.classes.new(layer.hidden_size)
        shown = tracer.classes.new(layer.proj_size) if layer.proj_size else units
        states = []
        for own in (shown, units) if isinstance(layer, nn.LSTM) else (units,):
            shape = layer.num_layers * (1 + layer.bidirectional), batch, len(own)
            states.append(torch.zeros(shape, dtype=args[0].dtype, device=args[0].device))
            tracer.give(states[-1], spread(own, 2, shape))
        return args[0], tuple(states) if isinstance(layer, nn.LSTM) else states[0]

    found = [layer.register_forward_pre_hook(give) for layer in module.modules() if isinstance(layer, nn.RNNBase)]
    try:
        yield
    finally:
        for hook in found:
            hook.remove()


@contextmanager
def _plainly(module: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode, and with operators that a layer has one of its own for taken apart."""
    kernels: tuple[Any, ...] = torch.backends.mkldnn, torch.backends.cudnn
    training, fast, enabled = module.training, torch.backends.mha.get_fastpath_enabled(), [k.enabled for k in kernels]
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    for own in kernels:
        own.enabled = False
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for own, before in zip(kernels, enabled, strict=True):
            own.enabled = before
        torch.backends.mha.set_fastpath_enabled(fast)
        module.train(training)
