"""A config of transformers for a network that was made narrower, where one can say what it has become."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from worker.model import Dtypes, Model
from worker.structure.depth import Shapes, shapes_of, shapes_said
from worker.students.configs import HEADS, INNER, integers, real

MOST_TRIED = 64  # configs; a network all of whose layers are alike needs a few


def expressed(model: Model, module: nn.Module, stored: Dtypes) -> Model | None:
    """The model of a smaller config with the module's weights, in the dtypes that are `stored`; None where a config has
    no words for it.

    A config has one size for all layers. Which it would be is read off the sizes that came in the place of the old.
    """
    plan: Any = model.plan
    if plan is None or plan.described != "config":
        return None
    wanted = shapes_of(module)
    for changes in itertools.islice(_candidates(model.module, wanted), MOST_TRIED):
        config = {**plan.folder.config, **changes}
        if shapes_said(plan, config) == wanted:
            built = plan.begin(config)
            built.load_state_dict(module.state_dict())
            made: Model = plan.model(config, built, stored)
            return made
    return None


def _candidates(module: Any, wanted: Shapes) -> Iterator[dict[str, int]]:
    """Changes of a config that some of the new sizes speak for."""
    made, sizes = module.config, _successors(shapes_of(module), wanted)
    inner, heads = integers(made, INNER), integers(made, HEADS)
    ways = [[{name: size} for size in sizes[value]] for name, value in inner.items()]
    hidden = getattr(made, real(made, "hidden_size"), None)
    if isinstance(hidden, int):
        ways.append([{real(made, "hidden_size"): size} for size in sizes[hidden]])
    count = next(iter(heads.values()), 0)
    each = getattr(made, "head_dim", None)
    if count and isinstance(each, int):  # else a head has its share of the hidden features
        ways.append([dict.fromkeys(heads, size // each) | {"head_dim": each} for size in sizes[count * each]])
        values = getattr(made, "num_key_value_heads", None)
        if isinstance(values, int) and values != count:
            ways.append([{"num_key_value_heads": size // each} for size in sizes[values * each]])
        elif "num_key_value_heads" in vars(made):
            ways[-1] = [{**own, "num_key_value_heads": own[next(iter(heads))]} for own in ways[-1]]
    for chosen in itertools.product(*ways):
        yield {name: size for own in chosen for name, size in own.items()}


def _successors(before: Shapes, after: Shapes) -> dict[int, list[int]]:
    """For each size what stands in its place in some weight, the smallest first."""
    found: dict[int, set[int]] = defaultdict(set)
    for name, shape in after.items():
        for old, new in zip(before.get(name, ()), shape, strict=False):
            found[old].add(new)
    return defaultdict(list, {old: sorted(new) for old, new in found.items()})
