"""Layers of an architecture in the words of an upload, read off the modules that they have become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.nn.modules.conv import _ConvNd

from app.contract.architecture import Architecture, Parallel, Residual, Sequential
from app.contract.errors import Unsupported
from app.contract.layers import Layer
from worker.structure.connections.rewording import WAYS
from worker.structure.dropping import Kept

# What says how many channels, features or units a layer has; in the words of torch and of an upload alike.
_SIZES = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "num_groups", "normalized_shape", "embedding_dim", "input_size", "hidden_size", "proj_size", "num_parameters",
)  # fmt: skip
_BIAS = "bias"  # of which modules keep the values, not whether there is one


def described(layers: Sequence[Layer], module: nn.Sequential) -> Architecture:
    """The architecture of a network that was built of `layers` and changed since: other sizes, products in the place of
    layers. Raises Unsupported where that is more than an architecture may have."""
    found = [layer.model_dump(mode="json") for layer in _layers(layers, module)]
    try:
        return Architecture.model_validate({"layers": found})
    except ValidationError as error:
        raise Unsupported(
            f"The new layers are more than an architecture may have ({error.errors()[0]['msg']}): exclude some."
        ) from error


def without(layers: Sequence[Layer], kept: Kept, path: str = "") -> tuple[Layer, ...]:
    """The layers without those that do not stay, in sequences in other layers too."""
    left = []
    for place in kept.get(path, range(len(layers))):
        layer, name = layers[place], f"{path}.{place}".lstrip(".")
        left.append(_without_inside(layer, kept, name))
    return tuple(left)


def _without_inside(layer: Layer, kept: Kept, name: str) -> Layer:
    if isinstance(layer, Sequential):
        return layer.model_copy(update={"layers": without(layer.layers, kept, name)})
    if isinstance(layer, Residual):
        inside = {part: without(getattr(layer, part), kept, f"{name}.{part}") for part in WAYS}
        return layer.model_copy(update=inside)
    if isinstance(layer, Parallel):
        own = enumerate(layer.branches)
        return layer.model_copy(
            update={"branches": tuple(without(branch, kept, f"{name}.branches.{place}") for place, branch in own)}
        )
    return layer


def _layers(layers: Sequence[Layer], modules: Iterable[nn.Module]) -> list[Layer]:
    return [_layer(layer, module) for layer, module in zip(layers, modules, strict=True)]


def _layer(layer: Layer, module: Any) -> Layer:
    if isinstance(layer, Sequential):
        return layer.model_copy(update={"layers": tuple(_layers(layer.layers, module))})
    if isinstance(layer, Residual):
        inside = {part: tuple(_layers(getattr(layer, part), getattr(module, part))) for part in WAYS}
        return layer.model_copy(update=inside)
    if isinstance(layer, Parallel):
        pairs = zip(layer.branches, module.branches, strict=True)
        return layer.model_copy(update={"branches": tuple(tuple(_layers(own, branch)) for own, branch in pairs)})
    return _product(layer, module) if isinstance(module, nn.Sequential) else _sized(layer, module)


def _sized(layer: Layer, module: Any) -> Layer:
    """With the sizes that its module has come to have, and a bias where it has come to have one."""
    own = {name: getattr(module, name) for name in _SIZES if name in type(layer).model_fields}
    if isinstance(module, nn.Linear | _ConvNd):
        own[_BIAS] = module.bias is not None
    if isinstance(module, nn.TransformerEncoderLayer):
        own["dim_feedforward"] = module.linear1.out_features
    return layer.model_copy(update=own)


def _product(layer: Layer, module: Any) -> Layer:
    """What was one layer and is a product, of which factors may be products again, of that layer's type and with sizes
    of their own."""
    if isinstance(module, nn.Sequential):
        return Sequential(type="Sequential", layers=tuple(_product(layer, one) for one in module))
    own = {name: getattr(module, name) for name in type(layer).model_fields if name not in ("type", _BIAS)}
    return type(layer).model_validate({"type": layer.type, **own, _BIAS: module.bias is not None})
