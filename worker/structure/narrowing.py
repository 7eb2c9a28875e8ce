"""A network without some of its units: shorter parameters, and layers that know their new sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from worker.structure.groups import Group, Structure
from worker.structure.literals import rewrite
from worker.techniques.pruning.weights import is_transformers_conv1d

NARROW = "narrow"
Kept = Mapping[str, Tensor]
"""By the group's name which of its units stay, in order."""

# What modules of attention call the number of their heads, and what is that times the size of a head.
_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "num_head", "num_key_value_heads", "num_kv_heads",
    "all_head_size", "inner_dim", "split_size",
)  # fmt: skip
_WIDTHS = ("embed_dim",)  # that of all heads together in some, of what comes in in others


Entries = dict[tuple[str, int], Tensor]
"""What stays of parameters, in order, by name and dimension."""


def left(structure: Structure, groups: Sequence[Group], kept: Kept) -> Entries:
    """The entries that stay, in order, of each parameter along each dimension that loses some."""
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        stays = torch.zeros(group.units, dtype=torch.bool)
        stays[kept[group.name]] = True
        for cut in group.cuts:
            gone[cut.parameter, cut.dim].append(cut.places[~stays].reshape(-1))
    found: Entries = {}
    for key, places in gone.items():
        mask = torch.ones(len(structure.classes[key]), dtype=torch.bool)
        mask[torch.cat(places)] = False
        if not mask.all():
            found[key] = mask.nonzero().flatten()
    return found


def narrowed(
    module: nn.Module, structure: Structure, groups: Sequence[Group], kept: Kept, entries: Entries
) -> dict[str, Any]:
    """What is told of it, in words: new lengths, attributes of modules that say how many heads there are, and numbers
    in a graph's code."""
    lengths: dict[str, dict[str, int]] = defaultdict(dict)
    for (name, dim), own in entries.items():
        lengths[name][str(dim)] = len(own)
    numbers = _numbers(structure, entries)
    attributes = _attributes(module, groups, kept)
    return {"kind": NARROW, "lengths": dict(lengths), "attributes": attributes, "numbers": numbers}


def apply_narrow(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Shortens parameters to their first entries, and tells layers of it."""
    narrow(
        module,
        {
            (name, int(dim)): torch.arange(length)
            for name, dims in edit["lengths"].items()
            for dim, length in dims.items()
        },
        edit,
    )


def narrow(module: nn.Module, entries: Entries, edit: Mapping[str, Any]) -> None:
    """Keeps these entries of parameters, in place, and tells layers and graphs of it what the edit says. Parameters
    that are shared stay shared."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for (name, dim), own in entries.items():
        tensor = tensors[name]
        tensor.data = tensor.data.index_select(dim, own.to(tensor.device)).contiguous()
        tensor.grad = None
    for layer in module.modules():
        _fit(layer)
    rewrite(module, edit["numbers"])
    for path, values in edit["attributes"].items():
        for name, value in values.items():
            setattr(module.get_submodule(path), name, value)


def _attributes(module: nn.Module, groups: Sequence[Group], kept: Kept) -> dict[str, dict[str, int]]:
    """Of modules whose own layers make units of several entries each: of heads."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for group in groups:
        stay = len(kept[group.name])
        owners = {
            cut.parameter.rpartition(".")[0].rpartition(".")[0]
            for cut in group.cuts
            if cut.made and cut.places.shape[1] > 1
        }
        if stay == group.units:
            continue
        for path in owners:
            own = vars(module.get_submodule(path))
            heads = [name for name in _HEADS if _count(own, name) % group.units == 0 and _count(own, name)]
            if not heads:
                continue
            for name in (*heads, *(name for name in _WIDTHS if _count(own, name) % group.units == 0)):
                if name in own:
                    found[path][name] = own[name] // group.units * stay
    return dict(found)


def _numbers(structure: Structure, entries: Entries) -> dict[str, dict[str, int]]:
    """New ones for those that count channels of which some go."""
    gone = [_gone(structure.classes[key], own) for key, own in entries.items()]
    lost = torch.cat(gone).unique() if gone else torch.zeros(0, dtype=torch.int64)
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for own in structure.literals:
        stay = int((~torch.isin(own.labels, lost)).sum())
        if stay < len(own.labels):
            found[own.node][".".join(map(str, own.path))] = stay
    return dict(found)


def _gone(classes: Tensor, stay: Tensor) -> Tensor:
    mask = torch.ones(len(classes), dtype=torch.bool)
    mask[stay] = False
    return classes[mask]


def _count(own: Mapping[str, Any], name: str) -> int:
    value = own.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _fit(layer: Any) -> None:
    """Lets a layer of torch have the sizes that its parameters have."""
    if is_transformers_conv1d(layer):
        layer.nx, layer.nf = layer.weight.shape
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        _fit_convolution(layer)
    elif isinstance(layer, _NormBase):
        own = layer.running_mean if layer.weight is None else layer.weight
        layer.num_features = layer.num_features if own is None else len(own)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = layer.normalized_shape if layer.weight is None else tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        if layer.num_groups == layer.num_channels:
            layer.num_groups = len(layer.weight)
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.RNNBase):
        _fit_recurrent(layer)


def _fit_convolution(layer: Any) -> None:
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    first, second = layer.weight.shape[:2]
    if isinstance(layer, _ConvTransposeNd):
        layer.groups = first if depthwise else layer.groups
        layer.in_channels, layer.out_channels = first, second * layer.groups
        return
    layer.groups = first // (layer.out_channels // layer.groups) if depthwise else layer.groups
    layer.in_channels, layer.out_channels = second * layer.groups, first


def _fit_recurrent(layer: Any) -> None:
    gates = layer.weight_hh_l0.shape[0]
    layer.hidden_size = gates // {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    layer.input_size = layer.weight_ih_l0.shape[1]
    if layer.proj_size:
        layer.proj_size = layer.weight_hr_l0.shape[0]
        if layer.hidden_size <= layer.proj_size:
            raise ValueError("torch takes an LSTM with as many units as it shows for one without a projection")
    layer._init_flat_weights()
