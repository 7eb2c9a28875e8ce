"""Configs of transformers for networks that became smaller, where one can say what they have become."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from worker.model import Dtypes, Model
from worker.structure.blocks import passed, same, varied
from worker.structure.depth import Shapes, shapes_of, shapes_said
from worker.structure.groups import Group
from worker.students.configs import HEADS, INNER, integers, real

MOST_TRIED = 64  # configs; a network all of whose layers are alike needs a few


def expressed(model: Model, module: nn.Module, stored: Dtypes) -> Model | None:
    """The model of a smaller config with the module's weights, in the dtypes that are `stored`; None where a config has
    no words for it.

    A config has one size for all layers. Which it would be is read off the sizes that came in the place of the old, and
    held against what the module computes: as many features may be more heads, or fewer.
    """
    plan: Any = model.plan
    if plan is None or plan.described != "config":
        return None
    wanted = shapes_of(module)
    for changes in itertools.islice(_candidates(model.module, wanted), MOST_TRIED):
        config = {**plan.folder.config, **changes}
        if shapes_said(plan, config) == wanted:
            made = read_again(plan, changes, module, stored)
            if made is not None:
                return made
    return None


def read_again(plan: Any, changes: Mapping[str, Any], module: nn.Module, stored: Dtypes) -> Model | None:
    """The model of the plan's config with `changes`, written with the module's weights and read; None where that does
    not go, or computes something else. The module lies on the CPU from then on."""
    try:
        made: Model = plan.model({**plan.folder.config, **changes}, module.cpu(), stored)
        module.load_state_dict(made.module.state_dict())  # as the file has rounded it
    except Exception:  # classes of transformers raise errors of every class
        return None
    inputs = varied(made)
    return made if same(passed(made.module, inputs), passed(module, inputs)) else None


def counted_by_hidden_size(model: Model, groups: Sequence[Group]) -> tuple[list[Group], int]:
    """The groups that a config counts by one number, where a head has no size of its own but its share of the hidden
    features, and that size: features that all layers add to, heads, and what is as wide. None, and 1, elsewhere."""
    made: Any = getattr(model.module, "config", None)
    if model.plan is None or model.plan.described != "config" or isinstance(getattr(made, "head_dim", None), int):
        return [], 1
    hidden = getattr(made, real(made, "hidden_size"), None)
    # Queries, keys and values may be one weight, which has several times the features of a head.
    own = [group for group in groups if group.units * min(cut.places.shape[1] for cut in group.cuts) == hidden]
    heads = {group.units for group in own if group.in_blocks}
    if not isinstance(hidden, int) or len(heads) != 1:
        return [], 1
    return own, hidden // heads.pop()


def _candidates(module: Any, wanted: Shapes) -> Iterator[dict[str, int]]:
    """Changes of a config that some of the new sizes speak for."""
    made, sizes = module.config, _successors(shapes_of(module), wanted)
    heads, key = integers(made, HEADS), real(made, "hidden_size")
    count, each = next(iter(heads.values()), 0), getattr(made, "head_dim", None)
    hidden = getattr(made, key, None)
    ways = [[{name: size} for size in sizes[value]] for name, value in _inner(made, hidden).items()]
    if isinstance(hidden, int):
        ways.append([{key: size} for size in sizes[hidden]])
        if count and not isinstance(each, int):  # heads may be fewer, of the size that they have
            ways[-1] += [{key: size, **dict.fromkeys(heads, size * count // hidden)} for size in sizes[hidden]]
    if count and isinstance(each, int):  # else a head has its share of the hidden features
        ways.append([dict.fromkeys(heads, size // each) | {"head_dim": each} for size in sizes[count * each]])
        values = getattr(made, "num_key_value_heads", None)
        if isinstance(values, int) and values != count:
            ways.append([{"num_key_value_heads": size // each} for size in sizes[values * each]])
        elif "num_key_value_heads" in vars(made):
            ways[-1] = [{**own, "num_key_value_heads": own[next(iter(heads))]} for own in ways[-1]]
    for chosen in itertools.product(*ways):
        yield {name: size for own in chosen for name, size in own.items()}


def _inner(made: Any, hidden: Any) -> dict[str, int]:
    """Widths of feed-forward layers; one that a config leaves open (GPT-2) is four times the hidden size."""
    open_ = [name for name in INNER if vars(made).get(name, hidden) is None]
    return integers(made, INNER) | (dict.fromkeys(open_, 4 * hidden) if isinstance(hidden, int) else {})


def _successors(before: Shapes, after: Shapes) -> dict[int, list[int]]:
    """For each size what stands in its place in some weight, the smallest first."""
    found: dict[int, set[int]] = defaultdict(set)
    for name, shape in after.items():
        for old, new in zip(before.get(name, ()), shape, strict=False):
            found[old].add(new)
    return defaultdict(list, {old: sorted(new) for old, new in found.items()})
