"""Which batch norms a layer beside them can hold, found by what reads what in a pass of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from worker.data.batch import Inputs
from worker.structure.calls import computes_as
from worker.structure.fusing.edit import BEFORE, BEHIND
from worker.structure.fusing.watching import Pass, watched

_LINEAR = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Stays = Callable[[str], str | None]
"""Why a layer or a norm of this name has to stay as it is, or None."""


@dataclass
class Foldable:
    """Each with `layer`, `norm` and `way`; why other norms stay, by name."""

    folds: list[dict[str, str]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def foldable(module: nn.Module, inputs: Inputs, stays: Stays) -> Foldable:
    """Folds that do not touch each other's layers: what is left may be found in another round."""
    names = {own: name for name, own in module.named_modules()}
    norms = [own for own in names if isinstance(own, _BatchNorm)]
    layers = [own for own in names if computes_as(own, *_LINEAR) and not is_parametrized(own)]
    found, taken = Foldable(), set[nn.Module]()
    if not norms:
        return found
    seen = watched(module, inputs, [*norms, *layers])
    makers = {id(made): own for own in layers for made in seen.made.get(own, ()) if isinstance(made, Tensor)}
    readers = {id(given): own for own in layers for given in seen.given.get(own, ()) if isinstance(given, Tensor)}
    for norm in norms:
        ways = _ways(norm, seen, makers, readers)
        reasons = [stays(names[norm]) or _why_not(norm, seen)]
        for way, layer in ways if reasons[0] is None else ():
            reason = stays(names[layer]) or (_behind if way == BEHIND else _before)(norm, layer, seen)
            if reason is None and layer not in taken:
                found.folds.append({"layer": names[layer], "norm": names[norm], "way": way})
                taken.add(layer)
                break
            reasons.append(reason)
        else:
            found.kept[names[norm]] = next((one for one in reasons if one), _NOTHING_BESIDE)
    return found


_NOTHING_BESIDE = "no linear layer or convolution is directly in front of it or behind it"


def _ways(
    norm: nn.Module, seen: Pass, makers: dict[int, nn.Module], readers: dict[int, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """The layers beside a norm that is called once, the one in front of it first."""
    if len(seen.given.get(norm, ())) != 1:
        return []
    beside = ((BEHIND, makers.get(id(seen.given[norm][0]))), (BEFORE, readers.get(id(seen.made[norm][0]))))
    return [(way, layer) for way, layer in beside if layer is not None]


def _why_not(norm: Any, seen: Pass) -> str | None:
    if not computes_as(norm, _BatchNorm):
        return "it computes in a way of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it normalizes by what each batch has, not by statistics of a training"
    calls = len(seen.given.get(norm, ()))
    return None if calls == 1 else f"the network calls it {calls} times"


def _behind(norm: nn.Module, layer: nn.Module, seen: Pass) -> str | None:
    made = seen.made[layer][0]
    if isinstance(layer, nn.Linear) and made.ndim != 2:
        return "it normalizes another dimension than the layer's outputs"
    if seen.is_read(made, norm, layer):
        return "what the layer gives is read elsewhere too"
    return _alone(layer, seen)


def _before(norm: nn.Module, layer: Any, seen: Pass) -> str | None:
    made = seen.made[norm][0]
    if isinstance(layer, nn.Linear) and made.ndim != 2:
        return "it normalizes another dimension than the layer's inputs"
    if isinstance(layer, _TRANSPOSED):
        return "the convolution behind it is transposed, and its borders are sums of fewer channels"
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and not _is_unpadded(layer):
        return "the convolution behind it pads with zeros, which it does not normalize"
    if seen.is_read(made, norm, layer):
        return "what it gives is read elsewhere too"
    return _alone(layer, seen)


def _is_unpadded(layer: _ConvNd) -> bool:
    if layer.padding == "same":
        return all(size == 1 for size in layer.kernel_size)
    return layer.padding == "valid" or not any(layer.padding)


def _alone(layer: Any, seen: Pass) -> str | None:
    if len(seen.made[layer]) != 1:
        return f"the network calls the layer {len(seen.made[layer])} times"
    for own in (layer.weight, layer.bias):
        if own is not None and seen.is_read(own, layer):
            return "the layer's weight is read elsewhere too"
    return None
