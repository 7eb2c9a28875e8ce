"""Which words of a transformers config say that stacks have fewer layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from worker.model import Model
from worker.structure.dropping import Kept, shortened
from worker.students.configs import shallower

Shapes = Mapping[str, tuple[int, ...]]


def guessed(module: nn.Module, kept: Kept) -> dict[str, Any]:
    """What the module's own config most likely says of so few layers; nothing where it has no words for it."""
    return next(_ways(module, kept), {})


def told(model: Model, kept: Kept) -> dict[str, Any]:
    """What the config of the model's folder says in place of what it said, where that describes the network without the
    layers that went; else what is most likely."""
    likely = guessed(model.module, kept)
    if model.plan is None or model.plan.described != "config":
        return likely
    # Only here, since transformers takes seconds to import.
    from worker.loading.huggingface import ConfigPlan

    plan = model.plan
    assert isinstance(plan, ConfigPlan)
    with shortened(model.module, kept, {}):
        wanted = shapes_of(model.module)

    def describes(changes: dict[str, Any]) -> bool:
        return shapes_said(plan, {**plan.folder.config, **changes}) == wanted

    return next(filter(describes, _ways(model.module, kept)), likely)


def _ways(module: nn.Module, kept: Kept) -> Iterator[dict[str, Any]]:
    config = getattr(module, "config", None)
    if config is None:
        return iter(())
    counts = [(len(module.get_submodule(name)._modules), list(places)) for name, places in kept.items()]
    return shallower(config, counts)


def shapes_said(plan: Any, config: dict[str, Any]) -> Shapes | None:
    """Those of the network that a config says; None for one that says none."""
    try:
        return shapes_of(plan.begin(config, "meta"))
    except Exception:  # classes of transformers raise errors of every class
        return None


def shapes_of(module: nn.Module) -> Shapes:
    """Of all that a state dict has."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
