"""Smaller configs of transformers: fewer layers, and fewer heads of the same size with all that hangs on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.contract.errors import Unsupported
from worker.students.depths import spread

_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
INNER = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner")
# Numbers of layers of single stacks, besides.
_OF_STACKS = ("num_encoder_layers", "num_decoder_layers")
# One entry a layer, which is chosen along with the layer.
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types")
# Widths of the stages of convolutional networks, in steps that vector units like.
_STAGE_WIDTHS, _STAGE_DEPTHS, STEP = "hidden_sizes", "depths", 8


@dataclass(frozen=True)
class Shrunk:
    """A smaller config, and what of the features of the larger one goes into it.

    Features are kept in whole `units` (of a head, or of the heads that share keys and values): `kept` of them out of
    `units`. A size that is no multiple of units has features of its own; those of `inner` sizes are of one layer each.
    """

    config: dict[str, Any]
    units: int = 1
    kept: int = 1
    shared: frozenset[int] = field(default_factory=frozenset)
    """Sizes of what is divided into units: hidden features, queries, keys and values, heads."""
    inner: frozenset[int] = field(default_factory=frozenset)


def shrunk(config: Mapping[str, Any], made: Any, width: float, depth: float) -> Shrunk:
    """A config with these shares of width and depth, rounded to whole heads and layers, at least one of each.

    `config` is the folder's, `made` the object that transformers makes of it, which knows defaults and other names.
    Raises Unsupported where the config has nothing of the kind.
    """
    changes = _fewer_layers(made, depth) if depth < 1 else {}
    if width == 1:
        return Shrunk({**config, **changes})
    if isinstance(getattr(made, _STAGE_WIDTHS, None), list | tuple):
        changes |= _narrower_stages(made, width)
        return Shrunk({**config, **changes})
    return _fewer_heads(config, made, width, changes)


def has_layers(made: Any) -> bool:
    """Whether there are layers to leave out."""
    return any(count > 1 for count in (*integers(made, _DEPTHS).values(), *(getattr(made, _STAGE_DEPTHS, None) or ())))


def shallower(made: Any, stacks: Sequence[tuple[int, Sequence[int]]]) -> Iterator[dict[str, Any]]:
    """What a config may say in place of what it says, where stacks of layers have only some left: of each how many it
    has, and the places of those that stay. Which number is of which stack it does not say, so several may be right."""
    for words in itertools.product(*(_words(made, count) for count, _ in stacks)):
        changes: dict[str, Any] = {}
        for (stage, key), (_, kept) in zip(words, stacks, strict=True):
            if stage is None:
                changes |= {key: len(kept), **_of_layers(made, getattr(made, key), kept)}
            else:
                depths = list(changes.get(key, getattr(made, key)))
                depths[stage] = len(kept)
                changes[key] = depths
        if len(set(words)) == len(words):
            yield changes


def _words(made: Any, count: int) -> list[tuple[int | None, str]]:
    """Numbers of a config that may be that of a stack of so many layers: by their name, and their place in it."""
    found: list[tuple[int | None, str]] = [
        (None, key) for key, own in integers(made, (*_DEPTHS, *_OF_STACKS)).items() if own == count
    ]
    stages = getattr(made, _STAGE_DEPTHS, None)
    places = enumerate(stages) if isinstance(stages, list | tuple) else ()
    return found + [(place, _STAGE_DEPTHS) for place, own in places if own == count]


def _of_layers(made: Any, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """What is there once for each of so many layers, of those that are kept."""
    found = {name: getattr(made, name, None) for name in _BY_LAYER}
    return {
        name: [own[place] for place in kept]
        for name, own in found.items()
        if isinstance(own, list) and len(own) == count
    }


def _fewer_layers(made: Any, share: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, count in integers(made, _DEPTHS).items():
        left = found[key] = max(1, round(share * count))
        found |= _of_layers(made, count, spread(count, left))
    stages = getattr(made, _STAGE_DEPTHS, None)
    if isinstance(stages, list | tuple):
        found[_STAGE_DEPTHS] = [max(1, round(share * count)) for count in stages]
    if not found:
        raise Unsupported("The config names no number of layers, so none can be left out. Give shrink: width.")
    return found


def _narrower_stages(made: Any, share: float) -> dict[str, Any]:
    found: dict[str, Any] = {_STAGE_WIDTHS: [_stepped(size, share) for size in getattr(made, _STAGE_WIDTHS)]}
    if isinstance(getattr(made, "embedding_size", None), int):
        found["embedding_size"] = _stepped(made.embedding_size, share)
    return found


def _stepped(size: int, share: float) -> int:
    return min(size, max(STEP, round(share * size / STEP) * STEP))


def _fewer_heads(config: Mapping[str, Any], made: Any, share: float, changes: dict[str, Any]) -> Shrunk:
    heads = integers(made, HEADS)
    hidden_key = real(made, "hidden_size")
    hidden = getattr(made, hidden_key, None)
    if not heads or not isinstance(hidden, int) or len(set(heads.values())) != 1:
        raise Unsupported("The config does not say hidden_size and one number of attention heads. Give shrink: depth.")
    count = next(iter(heads.values()))
    values = getattr(made, "num_key_value_heads", None) or count
    if hidden % values:
        raise Unsupported(f"{hidden} hidden features are no multiple of {values} heads. Give shrink: depth.")
    kept = max(1, round(share * values))
    per_head = getattr(made, "head_dim", None) or hidden // count
    inner = integers(made, INNER) or {}
    changes[hidden_key] = hidden // values * kept
    changes |= dict.fromkeys(heads, count // values * kept)
    if "num_key_value_heads" in config or values != count:
        changes["num_key_value_heads"] = kept
    changes |= {key: max(1, round(share * size)) for key, size in inner.items()}
    shared = frozenset({hidden, count * per_head, values * per_head, count, values})
    # Without a size of its own, the inner layer is four times as wide as the hidden one.
    return Shrunk({**config, **changes}, values, kept, shared, frozenset(inner.values()) or frozenset({4 * hidden}))


def integers(made: Any, names: Sequence[str]) -> dict[str, int]:
    """The values that a config has under these names, or under those that it calls them by."""
    keys = dict.fromkeys(real(made, name) for name in names)
    found = {key: getattr(made, key, None) for key in keys}
    return {key: value for key, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}


def real(made: Any, name: str) -> str:
    return str((getattr(made, "attribute_map", None) or {}).get(name, name))
