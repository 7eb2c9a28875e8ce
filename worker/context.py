"""The only thing that a technique touches besides tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from app.contract.spec import ExportFormat, Quantize
from worker.checkpoints.points import Checkpoints
from worker.data.feed import Feed
from worker.model import Model
from worker.ranks.ranks import Ranks
from worker.structure.edits import Edit
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.static.ranges_math import Range
from worker.techniques.quantization.weight_grid import WeightGrid


@dataclass(frozen=True)
class Wanted:
    """What a max_accuracy_drop asks for on the validation split, higher being better, and the artifacts that are
    computed otherwise than what the step judged."""

    metric: float
    judged_otherwise: tuple[ExportFormat, ...]


@dataclass
class Context:
    """What a running job hands to each of its steps.

    `model.module` is changed in place (weights, parametrizations). `teacher` is the uploaded module, frozen, in
    eval mode, and `named` holds the other uploaded models that the job names, by id. `quantization` is what a
    quantize step leaves for the exporters, since int8 lives in the artifact and not in the module, and `int8` what
    the first of them has made of it; `grids` are those that weights have come to lie on, by name, `ranges` what the
    inputs of their layers were trained to be rounded in, and `scales` those of weights that are now float8 times a
    scale, of a shape that broadcasts against the weight, and `wanted` what the artifacts have to hold.
    `edits` are what steps have changed of the network's structure, or None where it is another network: a student.
    `checkpoints` are the job's; a training that is no part of it (a trial on a copy) has none. `replaced` is the
    uploaded model where a student has taken its place. `memory_bytes` is what the job may take; None: nobody set a
    limit. `ranks` are the processes that run the job: this one alone, or one of several that take the same steps.
    """

    model: Model
    teacher: nn.Module
    feed: Feed | None
    device: torch.device
    seed: int
    scratch: Path
    progress: Callable[[float], None]
    quantization: Quantize | None = None
    int8: Int8Graph | None = None
    grids: dict[str, WeightGrid] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    wanted: Wanted | None = None
    edits: list[Edit] | None = field(default_factory=list)
    checkpoints: Checkpoints | None = None
    memory_bytes: int | None = None
    named: Mapping[str, Model] = field(default_factory=dict)
    replaced: Model | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def replace_model(self, model: Model) -> None:
        """What follows (steps, exports, figures) is about this model; the teacher stays the uploaded one."""
        self.replaced = self.uploaded
        self.model = model
        model.module.to(self.device)
        if self.feed is not None:
            self.feed = Feed(model, self.feed.data)

    @property
    def uploaded(self) -> Model:
        """The model as it was uploaded, or what has its form: a student may stand in its place."""
        return self.replaced or self.model
