"""Which weights of a network can be pruned: matrices and kernels, never biases, norms or positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from app.contract.errors import InvalidSpec
from worker.constraints import Mask, computed, impose_mask, mask_of, masks, set_mask, stored
from worker.loading.program_module import Holder
from worker.model import WeightHolder

LAYERS_NAMED = 8  # so many names of layers in an error are enough to see the pattern of names


@dataclass(frozen=True)
class PrunableWeight:
    """One weight tensor: the layer's name and the weight's own, as in the plain state dict."""

    layer: str
    name: str
    owner: nn.Module
    attribute: str

    def value(self) -> Tensor:
        """The weight that the layer computes with."""
        return getattr(self.owner, self.attribute).detach()

    def by_output(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape with outputs first and inputs second, or one of those turned back."""
        if tensor.ndim < 2 or not has_inputs_first(self.owner):
            return tensor
        return tensor.transpose(0, 1)


def prunable(module: nn.Module) -> list[PrunableWeight]:
    """Every weight that can be pruned, in the network's order; one that layers share is there once."""
    found: list[PrunableWeight] = []
    seen: set[int] = set()
    for layer, owner in module.named_modules():
        for attribute in _attributes(owner):
            parameter = stored(owner, attribute)
            if id(parameter) not in seen and parameter.is_floating_point():
                seen.add(id(parameter))
                found.append(PrunableWeight(layer, f"{layer}.{attribute}".lstrip("."), owner, attribute))
    return found


def select(module: nn.Module, exclude: tuple[str, ...], named: tuple[str, ...] = ()) -> list[PrunableWeight]:
    """The prunable weights without those whose layer or own name matches a pattern of `exclude`.

    Raises InvalidSpec for a pattern, there or in `named`, that matches nothing, naming the layers that there are, and
    where nothing is left.
    """
    weights = prunable(module)
    for field, patterns in (("exclude", exclude), ("layers", named)):
        for pattern in patterns:
            if not any(matches(weight, pattern) for weight in weights):
                raise InvalidSpec(
                    f"{field}: {pattern!r} matches no layer that the step is for. There are {_names(weights)}."
                )
    left = [weight for weight in weights if not any(matches(weight, pattern) for pattern in exclude)]
    if not left:
        raise InvalidSpec(f"exclude leaves nothing of {_names(weights)}. Give fewer patterns.")
    return left


class WeightSet:
    """The weights that one step prunes, and the masks on them."""

    def __init__(self, module: nn.Module, weights: list[PrunableWeight]) -> None:
        self.module = module
        self.weights = weights

    def values(self) -> list[Tensor]:
        return [weight.value() for weight in self.weights]

    def kept(self) -> list[Tensor]:
        """The mask of each weight; all true where there is none yet."""
        imposed = masks(self.module)
        return [
            imposed[weight.name] if weight.name in imposed else torch.ones_like(weight.value(), dtype=torch.bool)
            for weight in self.weights
        ]

    def drop(self, dropped: list[Tensor]) -> None:
        """Prunes, beside what is pruned already."""
        for weight, gone in zip(self.weights, dropped, strict=True):
            impose_mask(self.module, weight.name, ~gone)

    def only(self, kept: list[Tensor]) -> None:
        """Keeps just these, also such as were pruned; what is pruned keeps its value behind the mask."""
        for weight, mask in zip(self.weights, kept, strict=True):
            set_mask(self.module, weight.name, mask)

    def layers(self) -> list[Mask]:
        """The masks themselves; every weight has to have one."""
        return [mask_of(weight.owner, weight.attribute) for weight in self.weights]

    def total(self) -> int:
        return sum(value.numel() for value in self.values())

    def removed(self) -> int:
        return sum(mask.numel() - int(mask.count_nonzero()) for mask in self.kept())


def _attributes(layer: nn.Module) -> Iterator[str]:
    """The names of a layer's own parameters that can be pruned; none where the network computes its weights."""
    if computed(layer):
        return
    if isinstance(layer, (nn.Linear, _ConvNd, nn.Embedding, WeightHolder)) or is_transformers_conv1d(layer):
        yield "weight"
    elif isinstance(layer, nn.MultiheadAttention):
        projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        yield from (name for name in projections if getattr(layer, name) is not None)
    elif isinstance(layer, Holder):
        yield from layer.matrices
    elif isinstance(layer, nn.RNNBase):
        yield from (name for name in layer._flat_weights_names if name.startswith("weight_"))


def has_inputs_first(layer: nn.Module) -> bool:
    """Whether the weight has a row for each input."""
    if isinstance(layer, WeightHolder):
        return layer.inputs_first
    return isinstance(layer, _ConvTransposeNd) or is_transformers_conv1d(layer)


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """GPT-2's linear layer; by name, since importing transformers for a type would cost seconds."""
    return any(
        cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D" for cls in type(layer).__mro__
    )


def matches(weight: PrunableWeight, pattern: str) -> bool:
    """Whether the pattern is for the weight itself, for its layer, or for what holds that: a layer that has become a
    product is still called what it was."""
    names, holder = [weight.name], weight.layer
    while holder:
        names += [holder, f"{holder}.{weight.attribute}"]
        holder = holder.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) for name in names)


def listed(layers: Iterable[str]) -> str:
    """The first of these names, each once, and how many more there are."""
    names = list(dict.fromkeys(layers))
    more = f" and {len(names) - LAYERS_NAMED} more" if len(names) > LAYERS_NAMED else ""
    return ", ".join(names[:LAYERS_NAMED]) + more


def _names(weights: list[PrunableWeight]) -> str:
    return listed(weight.layer or weight.name for weight in weights)
