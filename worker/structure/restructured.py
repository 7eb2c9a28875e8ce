"""A Model around a network whose structure is no longer the upload's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.contract.errors import TersorError
from app.contract.layers import Layer
from app.contract.native import STAND_IN
from worker.constraints import baked
from worker.context import Context
from worker.export.onnx import export_onnx
from worker.loading.architecture import ArchitecturePlan
from worker.loading.describe import check_forward, layer_facts
from worker.model import Dtypes, Model
from worker.structure.calls import example_on
from worker.structure.connections.cutting import CUT
from worker.structure.connections.rewording import told_without, was_called
from worker.structure.described import described, without
from worker.structure.dropping import CONFIG, DROP, origin
from worker.structure.edits import Edit, apply
from worker.structure.expressed import expressed, read_again
from worker.structure.graphs import graph_module
from worker.structure.narrowing import NARROW
from worker.training.states import Unusable


def restructure(context: Context, edits: Sequence[Edit]) -> nn.Module:
    """A copy of the context's network with the edits, whose weights are still to be filled in where they are new."""
    module = baked(context.model.module)
    if any(edit["kind"] == CUT for edit in edits):
        module = graph_module(module, context.model)
    apply(module, edits)
    return module


def take(context: Context, module: nn.Module, edits: Sequence[Edit]) -> None:
    """Puts a network that was restructured by `edits` in the place of the context's, and remembers how it came about.

    Raises ModelRejected where it does not run, or is no longer what its task asks for.
    """
    context.replace_model(restructured(context.model, module, edits))
    if context.edits is not None:
        context.edits = [*context.edits, *edits]


def retake(context: Context, edits: Sequence[Edit]) -> None:
    """Makes edits that an earlier attempt has told of again, as many at a time as it did: what a config has words for
    is asked after each. Raises Unusable where they are not of this network."""
    try:
        for kind, of_kind in itertools.groupby(edits, lambda edit: edit.get("kind")):
            own = list(of_kind)
            for some in [[one] for one in own] if kind == NARROW else [own]:
                take(context, restructure(context, some), some)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, TersorError) as error:
        raise Unusable(f"its changes of the network's structure are not of this one ({error})") from error


def restructured(model: Model, module: nn.Module, edits: Sequence[Edit]) -> Model:
    """The model with another network in it, which `edits` have made of its own: in the upload's own words where these
    can say it.

    An architecture says anything. A program and a graph are written anew from the network. A config of transformers
    has words for fewer layers and other widths, but one width for all layers and none for products: beyond that
    `native_as` says which artifact stands in.
    """
    stored = _stored(model, module, edits)
    if isinstance(model.plan, ArchitecturePlan):
        assert isinstance(module, nn.Sequential)
        layers = _worded(model.plan.layers, edits)
        return model.plan.model(described(layers, module), module.cpu().state_dict(), stored)
    if (folder := _in_config(model, module, edits, stored)) is not None:
        return folder
    rewired = any(edit["kind"] == CUT for edit in edits)
    if not rewired and (told := expressed(model, module, stored)) is not None:
        return told
    module.eval()
    two, one = (example_on(module, model, batch) for batch in (2, 1))
    check_forward(module, model.facts.task, two, one, None)
    facts = model.facts.model_copy(
        update={"parameters": sum(own.numel() for own in module.parameters()), "layers": layer_facts(module)}
    )
    changed = replace(model, module=module, facts=facts, stored=stored, graph=None)
    if facts.format == "onnx":
        return replace(changed, save=_Graph(changed), saving=None)
    if facts.format == "pt2":
        return changed
    return replace(changed, plan=None, saving=None, native_as=STAND_IN)


def _worded(layers: Sequence[Layer], edits: Sequence[Edit]) -> Sequence[Layer]:
    """What an architecture's words say of those edits that its modules do not show."""
    for edit in edits:
        if edit["kind"] == DROP:
            layers = without(layers, edit["kept"])
        elif edit["kind"] == CUT:
            layers = told_without(layers, edit["join"], edit["side"])
    return layers


def _in_config(model: Model, module: nn.Module, edits: Sequence[Edit], stored: Dtypes) -> Model | None:
    """A folder of transformers again, or weights for a config, of which other words are all that changed; None where
    the network that these describe is not this one."""
    if model.plan is None or model.plan.described != "config" or not all(edit.get(CONFIG) for edit in edits):
        return None
    changes: dict[str, Any] = {}
    for edit in edits:
        changes |= edit[CONFIG]
    return read_again(model.plan, changes, module, stored)


class _Graph:
    """Writes an ONNX upload's network as a graph of its own."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, module: nn.Module, folder: Path) -> Path:
        return export_onnx(module, self._model, folder / self._model.facts.native_file)


def _stored(model: Model, module: nn.Module, edits: Sequence[Edit]) -> dict[str, torch.dtype]:
    """The dtypes of the file; a weight that is new has that of the layer in whose place it is."""
    found = {}
    for name, tensor in module.state_dict().items():
        layer = name
        for edit in reversed(edits):
            layer = _before(layer, edit, model)
        while layer and (own := model.stored.get(layer) or model.stored.get(f"{layer}.weight")) is None:
            layer = layer.rpartition(".")[0]
        if layer and own is not None and tensor.is_floating_point():
            found[name] = own
    return found


def _before(name: str, edit: Edit, model: Model) -> str:
    """What a tensor was called in front of an edit."""
    if edit["kind"] == DROP:
        return origin(name, edit["kept"])
    if edit["kind"] == CUT and isinstance(model.plan, ArchitecturePlan):
        return was_called(name, edit["join"], edit["side"])
    return name
